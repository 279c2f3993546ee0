// The second yardstick: the count as one would write it in node, with amqplib and pg, in an afternoon.
//
//     node peer.js PREFETCH BATCH      (AMQP_URL, DATABASE_URL and RABBITMQ_QUEUE in the environment)
//
// It writes the service's tables by the service's rule of identity, a batch in one statement, which is its own
// transaction, and acks after the commit. All else that the service does it leaves out: it checks no message, records
// no copy, sets nothing aside, and ends where anything fails.
'use strict';

const amqp = require('amqplib');
const pg = require('pg');

const BATCH_TIMEOUT_MS = 1000;

// One vote by vote_id, and one by law and voter: what is there already conflicts, and only what is new is added up.
const COUNT_BATCH = `
    WITH added AS (
        INSERT INTO vote_audit (vote_id, law_id, choice, voted_at, voter_hash, redelivered, instance)
        SELECT *, 'node' FROM unnest($1::uuid[], $2::text[], $3::text[], $4::timestamptz[], $5::text[], $6::boolean[])
        ORDER BY 1
        ON CONFLICT DO NOTHING
        RETURNING law_id, choice
    )
    INSERT INTO vote_results AS total (law_id, oui_count, non_count)
    SELECT law_id, count(*) FILTER (WHERE choice = 'oui'), count(*) FILTER (WHERE choice = 'non')
    FROM added GROUP BY law_id ORDER BY law_id
    ON CONFLICT (law_id) DO UPDATE SET
        oui_count = total.oui_count + EXCLUDED.oui_count,
        non_count = total.non_count + EXCLUDED.non_count
`;

class Peer {
  constructor(channel, database, size) {
    this.channel = channel;
    this.database = database;
    this.size = size;
    this.votes = [];
    this.last = null;
    this.timer = null;
    this.written = Promise.resolve(); // one batch at a time
  }

  // A message is one vote, or an array of them. It is read as it comes, while a batch is written.
  add(message) {
    const { redelivered } = message.fields;
    const body = JSON.parse(message.content);
    for (const vote of Array.isArray(body) ? body : [body]) {
      vote.redelivered = redelivered;
      this.votes.push(vote);
    }
    this.last = message;
    if (this.votes.length >= this.size) this.flush();
    else this.timer ??= setTimeout(() => this.flush(), BATCH_TIMEOUT_MS);
  }

  flush() {
    clearTimeout(this.timer);
    this.timer = null;
    if (this.votes.length === 0) return;
    const [votes, last] = [this.votes, this.last];
    this.votes = [];
    this.written = this.written.then(() => this.write(votes, last));
  }

  async write(votes, last) {
    const column = (name) => votes.map((vote) => vote[name] ?? null);
    const values = ['vote_id', 'law_id', 'choice', 'timestamp', 'voter_hash', 'redelivered'].map(column);
    await this.database.query({ name: 'count-batch', text: COUNT_BATCH, values });
    this.channel.ack(last, true);
  }
}

function say(message) {
  console.log(JSON.stringify({ time: new Date().toISOString(), message }));
}

async function main() {
  const [prefetch, size] = process.argv.slice(2).map(Number);
  const database = new pg.Client({ connectionString: process.env.DATABASE_URL });
  await database.connect();
  const connection = await amqp.connect(process.env.AMQP_URL);
  const channel = await connection.createChannel();
  await channel.prefetch(prefetch);
  const peer = new Peer(channel, database, size);

  let consuming = false; // deliveries may come with the broker's answer, before it is handled here
  const start = () => {
    if (!consuming) say('consuming');
    consuming = true;
  };
  const { consumerTag } = await channel.consume(process.env.RABBITMQ_QUEUE, (message) => {
    start();
    peer.add(message);
  });
  start();

  process.once('SIGTERM', async () => {
    await channel.cancel(consumerTag);
    peer.flush();
    await peer.written;
    await channel.close();
    await connection.close();
    await database.end();
  });
}

main();
