// Vercel's ai with its provider for OpenAI's API: node client_ai.mjs URL MODEL
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const provider = createOpenAICompatible({
    name: "fwdllm",
    baseURL: url,
    apiKey: "none",
    includeUsage: true,
    supportsStructuredOutputs: true,
});
const ask = {
    model: provider(model),
    prompt: "What does a cow say?",
    temperature: 0,
    maxOutputTokens: 60,
    maxRetries: 0,
};

const answer = await generateText(ask);
assert.ok(answer.text && answer.usage.outputTokens > 0);
const stream = streamText(ask);
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, answer.text);

const weather = tool({
    description: "The weather of a place",
    inputSchema: z.object({ place: z.enum(["Oslo", "Rome"]) }),
});
for (const toolChoice of ["required", { type: "tool", toolName: "weather" }]) {
    const forced = { ...ask, tools: { weather }, toolChoice };
    const [call] = (await generateText(forced)).toolCalls;
    assert.equal(call.toolName, "weather");
    assert.ok(["Oslo", "Rome"].includes(call.input.place));
    const streamed = streamText(forced);
    await streamed.consumeStream();
    const [same] = await streamed.toolCalls;
    assert.deepEqual([same.toolName, same.input], [call.toolName, call.input]);
}

const schema = z.object({ name: z.enum(["Oslo", "Rome"]), age: z.number().int().min(0).max(99) });
const { object } = await generateObject({ ...ask, schema });
assert.ok(object.age <= 99);
const parts = streamObject({ ...ask, schema });
let last;
for await (const part of parts.partialObjectStream) last = part;
assert.deepEqual(last, object);

const values = ["a cow", "a ship"];
const { embeddings } = await embedMany({ model: provider.embeddingModel(model), values });
assert.equal(embeddings.length, 2);

const { version } = createRequire(import.meta.url)("ai/package.json");
const tried = ["chat", "streaming", "tools", "structured output", "embeddings"];
console.log(JSON.stringify({ version, tried }));
