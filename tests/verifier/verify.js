// A verifier of proofs, chains of seals and exported audit logs, that follows docs/VERIFY.md and nothing else.
"use strict";
const { createHash } = require("node:crypto");
const fs = require("node:fs"), readline = require("node:readline");

const wrong = text => { throw new Error(text); };  // ends the check
const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash("sha256")).digest();
const ZERO = Buffer.from([0]), ONE = Buffer.from([1]);
const NUMBER = /^(0|[1-9][0-9]{0,18})$/, HASH = /^[0-9a-f]{64}$/;
const TIME = /^[0-9]{4,6}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{0,5}[1-9])?\+00$/;
const ID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/, NULL = /^\\N$/, TEXT = /^[^\t\n\r\b\f\v\p{Surrogate}]*$/u;
const ROW = [[ID], [TEXT], [/^(oui|non)$/], [TIME, NULL], [TIME], [TEXT], [TEXT], [/^[tf]$/], [NUMBER]];
const NUMBERS = { seal_id: NUMBER, from_txid: NUMBER, to_txid: NUMBER, votes: NUMBER };
const FIELDS = { ...NUMBERS, merkle_root: HASH, leaves_hash: HASH, sealed_at: TIME, previous_hash: HASH, records_hash: HASH, salt: HASH };
const SHORT = { seal_id: NUMBER, sealed_at: TIME, previous_hash: HASH, seal_hash: HASH };

const utf8 = bytes => new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);  // refuses what is none
const isOf = (form, text) => typeof text === "string" && form.test(text) && (form !== NUMBER || BigInt(text) < 2n ** 63n);
const isRow = row => row.length === ROW.length && row.every((text, n) => ROW[n].some(form => isOf(form, text)));

function seal(fields, isWhole) {
  const format = fields?.salt !== undefined ? 3 : fields?.records_hash !== undefined ? 2 : 1;  // each has one field more
  const forms = Object.entries(isWhole ? FIELDS : SHORT).slice(0, 7 + format);
  const isLeftOut = name => name in SHORT || fields[name] === undefined;
  if (!forms.every(([name, form]) => isOf(form, fields?.[name])) || !isWhole && !Object.keys(FIELDS).every(isLeftOut))
    wrong(`seal ${fields?.seal_id}: a field is missing or malformed`);
  const text = [`vote-audit-seal-${format}`, ...forms.map(([name]) => fields[name])].join("\t");
  const hash = isWhole ? sha256(text).toString("hex") : fields.seal_hash;
  if ("seal_hash" in fields && fields.seal_hash !== hash) wrong(`seal ${fields.seal_id}: its hash is not that of its fields`);
  const from = BigInt(fields.from_txid ?? 0), to = BigInt(fields.to_txid ?? 0);
  return { ...fields, format, hash, from, to, holds: txid => from <= txid && txid < to, name: `${fields.seal_id}:${hash}` };
}

function chain(list, isWhole, published) {
  if (!Array.isArray(list) || list.length === 0) wrong("there are no seals");
  const seals = list.map(fields => seal(fields, isWhole));
  seals.forEach((after, n) => {
    if (n === 0 && BigInt(after.seal_id) > 1n) return;  // the list begins later
    const before = seals[n - 1] ?? { seal_id: 0, hash: "0".repeat(64), to: 0n, format: 1 };
    const follows = BigInt(after.seal_id) === BigInt(before.seal_id) + 1n && after.previous_hash === before.hash;
    const isNext = follows && (!isWhole || after.from === before.to && after.format >= before.format);
    if (!isNext) wrong(`seal ${after.seal_id} does not follow from the one before`);
  });
  for (const name of published) if (!seals.some(one => one.name === name)) wrong(`the published seal ${name} is not in the chain`);
  return seals;
}

function root(level) {
  if (level.length < 2) return level[0] ?? sha256("");
  const pairs = level.filter((_, n) => n % 2 === 0).map((left, n) => [left, level[2 * n + 1]]);
  return root(pairs.map(([left, right]) => right ? sha256(ONE, left, right) : left));
}

function checkProof(proof, published) {
  const fields = typeof proof?.row === "string" ? proof.row.split("\t") : [];
  if (!isRow(fields) || fields[0] !== proof.vote_id) wrong("there is no row of this vote");
  const seals = chain(proof.seals, true, published);
  const path = Array.isArray(proof.path) ? [...proof.path] : wrong("there is no path");
  let node = sha256(ZERO, proof.row), index = BigInt(proof.index), last = BigInt(seals[0].votes) - 1n;
  if (!Number.isSafeInteger(proof.index) || index < 0n || index > last) wrong("the index is not one of the seal's");
  if (!path.every(step => typeof step === "string" && HASH.test(step))) wrong("the path is malformed");
  const next = () => Buffer.from(path.shift() ?? wrong("the path is too short"), "hex");
  for (; last > 0n; index /= 2n, last /= 2n)
    if (index % 2n) node = sha256(ONE, next(), node);
    else if (index < last) node = sha256(ONE, node, next());
  if (path.length || node.toString("hex") !== seals[0].merkle_root) wrong("the path does not lead to the root of the seal");
  return `vote ${fields[0]} (${fields[1]}, ${fields[2]}) is in the log that seal ${published[0] ?? seals.at(-1).name} names`;
}
const ESCAPES = { "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v" };
const copied = text => text === null ? "\\N" : text.replace(/[\\\b\f\n\r\t\v]/g, character => ESCAPES[character]);
const moment = text => text === null ? "\\N" : /^\S+T\S+\+00:00$/.test(text) ? text.replace("T", " ").slice(0, -3) : "none";

const rowOf = vote => [
  vote.vote_id, copied(vote.law_id), vote.choice, moment(vote.timestamp), moment(vote.recorded_at), copied(vote.voter_hash),
  copied(vote.instance), { true: "t", false: "f" }[JSON.stringify(vote.redelivered)], String(vote.txid)];

const sum = ([oui, non] = [0, 0], choice) => choice === "oui" ? [oui + 1, non] : [oui, non + 1];
function compare(name, stated, counted) {
  const isSum = law => String(stated[law] ?? [0, 0]) === String(counted.get(law) ?? [0, 0]);
  for (const law of [...Object.keys(stated), ...counted.keys()]) if (!isSum(law)) wrong(`${name}, ${law}: not the sum of the rows`);
}

async function checkExport(votesFile, document, published) {
  const seals = chain(document.seals, true, published);
  if (seals[0].seal_id !== "1") wrong("the first seal is missing");
  const next = BigInt(document.next_txid), sealedTo = seals.at(-1).to;
  if (next < sealedTo) wrong("transaction ids are lower than the sealed ones");
  const sealed = new Map(), all = new Map(), ids = new Set(), voters = new Set();
  let at = 0, leaves = [], short = [], before = "", beforeTxid = -1, unsealed = 0;
  const finish = one => {
    const found = [leaves.length, root(leaves).toString("hex"), sha256("", ...short).toString("hex")];
    if (`${found}` !== `${[one.votes, one.merkle_root, one.leaves_hash]}`) wrong(`seal ${one.seal_id}: its rows are other ones`);
    [leaves, short] = [[], []];
  };
  for await (const line of readline.createInterface({ input: fs.createReadStream(votesFile, "latin1") })) {
    const vote = JSON.parse(utf8(Buffer.from(line, "latin1")));  // a byte a character until here
    if (!Number.isSafeInteger(vote.txid) || !isRow(rowOf(vote))) wrong(`vote ${vote.vote_id}: a field is missing or malformed`);
    const row = rowOf(vote).join("\t"), txid = BigInt(vote.txid), voter = `${vote.law_id} ${vote.voter_hash}`;
    while (at < seals.length && txid >= seals[at].to) finish(seals[at++]);
    if (seals[at]?.holds(txid)) {
      leaves.push(sha256(ZERO, row));
      short.push(Buffer.from(vote.vote_id.replaceAll("-", ""), "hex"), leaves.at(-1).subarray(0, 8));
      sealed.set(vote.law_id, sum(sealed.get(vote.law_id), vote.choice));
    } else if (txid < sealedTo || txid >= next) wrong(`vote ${vote.vote_id}: a transaction that cannot be`);
    else unsealed++;
    all.set(vote.law_id, sum(all.get(vote.law_id), vote.choice));
    if (ids.has(vote.vote_id) || vote.voter_hash !== null && voters.has(voter)) wrong(`vote ${vote.vote_id} or its voter is there twice`);
    if (vote.txid < beforeTxid || vote.txid === beforeTxid && vote.vote_id < before) wrong(`vote ${vote.vote_id} is not in its place`);
    [before, beforeTxid] = [vote.vote_id, vote.txid];
    ids.add(before), voters.add(voter);
  }
  while (at < seals.length) finish(seals[at++]);
  const records = document.records.map(text => ({ text, fields: text.split("\t"), txid: BigInt(text.slice(text.lastIndexOf("\t") + 1)) }));
  for (const one of seals.filter(each => each.format > 1)) {
    const hash = sha256("", ...records.filter(({ txid }) => one.holds(txid)).map(({ text }) => `${text}\n`));
    if (hash.toString("hex") !== one.records_hash) wrong(`seal ${one.seal_id}: its certificates and recounts are other ones`);
  }
  const canBe = txid => txid < sealedTo ? seals.some(one => one.format > 1 && one.holds(txid)) : txid < next;
  for (const { txid, fields } of records) if (!canBe(txid)) wrong(`${fields[0]} ${fields[1]}: a transaction that cannot be`);
  compare("sealed_totals", document.sealed_totals, sealed);
  compare("totals", document.totals, all);
  for (const { fields: [kind, law, oui, non, , , sealId, json] } of records.filter(({ fields }) => fields[0] === "certificate")) {
    const [yes, no] = all.get(law) ?? [0, 0], said = JSON.parse(json.replaceAll("\\\\", "\\"));
    const isTrue = oui === String(yes) && non === String(no) && said.oui === yes && said.non === no && said.total === yes + no;
    const isNamed = said.law_id === law && said.seal === seals.find(one => one.seal_id === sealId)?.name;
    if (!isTrue || !isNamed) wrong(`${kind} of ${law}: it does not say what the log does`);
  }
  return `${ids.size - unsealed} votes in ${seals.length} seals computed anew, ${unsealed} not sealed; newest seal ${seals.at(-1).name}`;
}

async function main([command, ...rest]) {
  const files = { proof: 1, chain: 1, export: 2 }[command], published = rest.splice(files ?? 0);
  if (files === undefined || rest.length < files || !published.every(name => /^[0-9]+:[0-9a-f]{64}$/.test(name))) {
    console.error("usage: node verify.js proof FILE | chain FILE | export AUDIT SEALS, and published seals (number:hash)");
    return 2;
  }
  try {
    const document = JSON.parse(utf8(fs.readFileSync(rest.at(-1))));
    const newest = () => chain(document.seals, document.shows_numbers !== false, published).at(-1).name;
    if (command === "chain") console.log(`the chain is whole up to seal ${newest()}`);
    else console.log(command === "proof" ? checkProof(document, published) : await checkExport(rest[0], document, published));
    return 0;
  } catch (error) {
    console.log(`NOT VERIFIED: ${error.message}`);
    return 1;
  }
}

main(process.argv.slice(2)).then(code => { process.exitCode = code; });
