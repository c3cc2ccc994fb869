// The server's API, as the page needs it.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function answerOf(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: the status has to do */ }
  const wait = response.headers.get("retry-after");
  throw new ApiError(response.status, response.status === 429 && wait ? `${message} (in ${wait} s)` : message);
}

// What a request or a reader promises; where the connection fails, an error that says what to look for.
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError(0, "the connection broke off; is the server still there?");
    throw error;
  }
}

function headersOf(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

export async function models(key) {
  return (await (await answerOf(await reached(fetch("v1/models", { headers: headersOf(key) })))).json()).data;
}

// Calls handlers[event](data) for every event of a stream; an `error` event is thrown.
export async function stream(request, key, signal, handlers) {
  const headers = { ...headersOf(key), "content-type": "application/json" };
  const response = await answerOf(
    await reached(fetch("v1/generate/stream", { method: "POST", headers, signal, body: JSON.stringify(request) })),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", ended = false;
  for (;;) {
    const { done, value } = await reached(reader.read());
    if (done) break;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const [name, data] = parsed(text.slice(0, end));
      if (name === "error") throw new ApiError(500, data.error.message);
      ended ||= name === "done";
      handlers[name]?.(data);
    }
  }
  if (!ended) throw new ApiError(0, "the stream broke off before its end; try again");
}

function parsed(block) {
  const lines = block.split("\n");
  const of = (field) => lines.filter((line) => line.startsWith(`${field}: `)).map((line) => line.slice(field.length + 2)).join("\n");
  return [of("event"), JSON.parse(of("data"))];
}
