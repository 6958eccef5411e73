// Runs a prepared folder in onnxruntime-web (wasm) and posts every answer back to run_web.py, which serves this page and the folder.
import * as ort from "/packages/onnxruntime-web/dist/ort.wasm.min.mjs";
import { head } from "./head.mjs";

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = "/packages/onnxruntime-web/dist/";
ort.env.logLevel = "error";   // a warning per overridable input otherwise

const OUTPUTS = {
  cluster_id: BigInt64Array, distance: Float32Array, novelty_score: Float32Array, p_value: Float32Array,
  is_novel: Uint8Array, distances: Float32Array, embedding: Float32Array,
};

const PATCH_OUTPUTS = { patch_score: Float32Array, novelty_map: Float32Array };   // of a model with a bank
const outputsOf = (test) => (test.map_cells ? { ...OUTPUTS, ...PATCH_OUTPUTS } : OUTPUTS);

const AHEAD_BYTES = 8_000_000;

async function fetched(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${await answer.text()}`);
  return answer;
}

async function bytes(file, offset = 0, length = "") {
  return (await fetched(`/material/${file}?offset=${offset}&length=${length}`)).arrayBuffer();
}

async function tensors(entries) {
  const loaded = {};
  for (const [name, entry] of Object.entries(entries)) {
    loaded[name] = new ort.Tensor("float32", new Float32Array(await bytes(entry.file)), entry.shape);
  }
  return loaded;
}

const post = (path, body) => fetch(path, { method: "POST", body });

class Answers {
  constructor(rows, names) {
    this.rows = rows;
    this.names = names;
    this.filled = Object.fromEntries(Object.keys(names).map((name) => [name, 0]));
    this.values = {};
  }

  add(outputs, n) {
    for (const [name, kind] of Object.entries(this.names)) {
      const data = outputs[name];
      this.values[name] ??= new kind(this.rows * (data.length / n));
      this.values[name].set(data, this.filled[name]);
      this.filled[name] += data.length;
    }
  }

  async send(name) {
    for (const output of Object.keys(this.names)) await post(`/answers/${name}/${output}.bin`, this.values[output]);
  }
}

function outsideHead(data, n, t, l2) {
  const D = data.embedding.length / n;
  const rows = Array.from({ length: n },
    (_, i) => head(data.embedding.subarray(i * D, (i + 1) * D), t, l2, data.patch_score?.[i]));
  const joined = {};
  for (const [name, kind] of Object.entries(OUTPUTS)) {
    const values = rows.flatMap((row) => (name === "distances" || name === "embedding" ? [...row[name]] : [row[name]]));
    joined[name] = kind.from(kind === BigInt64Array ? values.map(BigInt) : values.map(Number));
  }
  return joined;
}

async function runPart(session, part, feed, test, about) {
  const answers = [];
  const size = part.height * part.width * 3;
  const ahead = part.batch * Math.max(1, Math.floor(AHEAD_BYTES / (size * part.batch)));   // frames fetched at once
  let fetchedPixels;
  for (let start = 0; start < part.count; start += part.batch) {
    const n = Math.min(part.batch, part.count - start);
    if (start % ahead === 0) {
      const length = Math.min(ahead, part.count - start) * size;
      fetchedPixels = new Uint8Array(await bytes(part.frames, part.offset + start * size, length));
    }
    const from = (start % ahead) * size;
    const pixels = fetchedPixels.slice(from, from + n * size);
    const image = new ort.Tensor("uint8", pixels, [n, part.height, part.width, 3]);
    let outputs;
    if (feed && about.overrides !== "head outside the graph") {
      try {
        outputs = await session.run({ image, ...feed.given });
        about.overrides = "inputs";
      } catch (error) {
        about.overrides = "head outside the graph";
        about.refusal = String(error.message ?? error);
      }
    }
    const outside = feed && !outputs;
    outputs ??= await session.run({ image });
    let data = Object.fromEntries(Object.keys(outputsOf(test)).map((name) => [name, outputs[name].data]));
    if (outside) data = { ...data, ...outsideHead(data, n, feed.all, test.l2) };
    answers.push([data, n]);
    Object.values(outputs).forEach((tensor) => tensor.dispose?.());
  }
  return answers;
}

async function runCase(test, about) {
  const session = await ort.InferenceSession.create(await bytes(test.model), { executionProviders: ["wasm"] });
  about.inputs = session.inputNames;
  const base = await tensors(test.codebook);
  const answers = new Answers(test.parts.reduce((sum, part) => sum + part.count, 0), outputsOf(test));
  for (const part of test.parts) {
    let feed = null;
    if (part.overrides) {
      const given = await tensors(test.overrides[part.overrides]);
      const all = { novelty_threshold: new ort.Tensor("float32", new Float32Array([1]), [1]), ...base, ...given };
      feed = { given, all: Object.fromEntries(Object.entries(all).map(([name, tensor]) => [name, tensor.data])) };
    }
    for (const [data, n] of await runPart(session, part, feed, test, about)) answers.add(data, n);
  }
  await answers.send(test.name);
  await session.release();
}

async function main() {
  const { cases } = await (await fetched("/material/manifest.json?offset=0&length=")).json();
  const about = { runtime: "onnxruntime-web", version: ort.env.versions.web, browser: navigator.userAgent, threads: 1 };
  for (const test of cases) {
    try {
      await runCase(test, about);
    } catch (error) {   // what this runtime cannot read or run is said, and the next case follows
      await post(`/answers/${test.name}/error.txt`, String(error.message ?? error));
    }
  }
  await post("/done", JSON.stringify(about));
}

main().catch((error) => post("/failed", `${error.message ?? error}\n${error.stack ?? ""}`));
