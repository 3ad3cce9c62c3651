// openai of npm: node client_openai.mjs URL MODEL DATA
import assert from "node:assert/strict";
import fs from "node:fs";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { VERSION } from "openai/version";
import { z } from "zod";

const [url, model, data] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What does a cow say?" }];
const ask = { model, messages, temperature: 0, max_tokens: 60 };

const answer = (await client.chat.completions.create(ask)).choices[0].message.content;
let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, answer);

const parameters = { type: "object", properties: { place: { enum: ["Oslo"] } }, required: ["place"] };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const tool_choice = { type: "function", function: { name: "weather" } };
for (const choice of [tool_choice, "required"]) {
    const forced = { ...ask, tools, tool_choice: choice };
    const [call] = (await client.chat.completions.create(forced)).choices[0].message.tool_calls;
    assert.deepEqual(JSON.parse(call.function.arguments), { place: "Oslo" });
    const whole = await client.chat.completions.stream(forced).finalChatCompletion();
    const [same] = whole.choices[0].message.tool_calls;
    assert.deepEqual(same.function.name, "weather");
    assert.deepEqual(same.function.arguments, call.function.arguments);
}

const City = z.object({ name: z.enum(["Oslo", "Rome"]), age: z.number().int() });
const parsed = await client.chat.completions.parse({
    ...ask,
    response_format: zodResponseFormat(City, "city"),
});
assert.ok(["Oslo", "Rome"].includes(parsed.choices[0].message.parsed.name));

const input = ["a cow", "a ship"];
const vectors = (await client.embeddings.create({ model, input })).data; // as base64
const floats = (await client.embeddings.create({ model, input, encoding_format: "float" })).data;
assert.ok(Math.abs(vectors[1].embedding[0] - floats[1].embedding[0]) < 1e-6);
const short = await client.embeddings.create({ model, input, dimensions: 8 });
assert.equal(short.data[0].embedding.length, 8);

const file = await client.files.create({ file: fs.createReadStream(data), purpose: "fine-tune" });
assert.equal(await (await client.files.content(file.id)).text(), fs.readFileSync(data, "utf8"));
const job = await client.fineTuning.jobs.create({
    model,
    training_file: file.id,
    suffix: "from node",
    metadata: { from: "node" },
    fwdllm: { rank: 1 },
});
assert.deepEqual((await client.fineTuning.jobs.retrieve(job.id)).metadata, { from: "node" });
assert.equal((await client.fineTuning.jobs.list()).data[0].id, job.id);
assert.equal((await client.fineTuning.jobs.cancel(job.id)).status, "cancelled");
const events = await client.fineTuning.jobs.listEvents(job.id);
assert.match(events.data[0].message, /cancelled/);

const tried = ["chat", "streaming", "tools", "structured output", "embeddings", "files", "jobs"];
console.log(JSON.stringify({ version: VERSION, tried }));
