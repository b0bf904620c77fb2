// The server's API: models, streamed chat completions, and answers parsed to tables or fields.

const KEY = "granite4v-key";
const WAIT_MS = 1000; // between two requests to a server that is still loading

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

/** Sends a request and returns the response; throws ApiError with the server's message. */
async function request(path, body, signal) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const method = body === undefined ? "GET" : "POST";
  const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not from this server, but from a proxy
  }
  throw new ApiError(message, response.status);
}

/** Waits until the server's model is loaded and returns it; `waiting` is called while it is loading. */
export async function model(waiting) {
  for (;;) {
    try {
      return (await (await request("/v1/models")).json()).data[0];
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 503) throw error;
      waiting(error.message);
      await new Promise((resolve) => setTimeout(resolve, WAIT_MS));
    }
  }
}

/** Parses an answer to its tables, fields or text; if it has not `ended`, only its complete parts. */
export async function parse(task, text, ended) {
  return (await request("/parse", { task, text, ended })).json();
}

/** Yields the chunks of a chat completion as they arrive. Aborting `signal` stops the answer. */
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError("the connection was closed before the end of the answer", 0);
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // comments keep the connection alive
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 0);
      yield chunk;
    }
  }
}
