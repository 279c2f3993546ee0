// Sends each line of standard input as node's amqplib sends it without being told anything.
//
//     node send_amqplib.js URL QUEUE [gzip]
'use strict';

const amqp = require('amqplib');
const fs = require('node:fs');

async function main(url, queue, contentEncoding) {
  const connection = await amqp.connect(url);
  const channel = await connection.createChannel();
  for (const line of fs.readFileSync(0, 'utf8').trim().split('\n')) {
    channel.sendToQueue(queue, Buffer.from(line), ...(contentEncoding ? [{ contentEncoding }] : []));
  }
  await channel.close();
  await connection.close();
}

main(...process.argv.slice(2));
