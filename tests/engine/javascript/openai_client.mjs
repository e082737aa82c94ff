// The openai package against the server: answers at once and streamed, several together, and a tool that must be called.
// It prints what it got as one object of JSON. Arguments: base address, key, model, number of tokens, tool as JSON.
import OpenAI from "openai";

const [baseURL, apiKey, model, nTokens, tool] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const common = { model, max_tokens: Number(nTokens), temperature: 0 };
const messages = [{ role: "user", content: "Tell me a story." }];

async function streamed(prompt) {
  let text = "";
  for await (const chunk of await client.completions.create({ ...common, prompt, stream: true })) {
    text += chunk.choices[0].text;
  }
  return text;
}

async function called() {
  const asked = JSON.parse(tool);
  const choice = { type: "function", function: { name: asked.function.name } };
  const body = { ...common, messages, tools: [asked], tool_choice: choice, stream: true };
  let words = "";
  for await (const chunk of await client.chat.completions.create(body)) {
    words += chunk.choices[0]?.delta.tool_calls?.[0]?.function.arguments ?? "";
  }
  return words;
}

const { data, response } = await client.chat.completions.create({ ...common, messages }).withResponse();
console.log(
  JSON.stringify({
    models: (await client.models.list()).data.map((found) => found.id),
    whole: data.choices[0].message.content,
    moves: Number(response.headers.get("x-cascade-moves")),
    tokens: data.usage.completion_tokens,
    together: await Promise.all(["one", "two", "three"].map((word) => streamed(`${word} brown fox`))),
    arguments: await called(),
    refusal: await client.chat.completions.create({ ...common, messages, max_tokens: -1 }).then(
      () => "none",
      (error) => `${error.constructor.name} ${error.status}`,
    ),
  }),
);
