// The service's API. Addresses are relative, so the page works wherever the service is mounted.

export function apiKey(value) {
  if (value !== undefined) sessionStorage.setItem("key", value.trim());
  return sessionStorage.getItem("key") ?? "";
}

async function ask(path, body, signal) {
  const key = apiKey();
  if (/[^\x21-\x7e]/.test(key)) throw new Error("An API key has letters, digits and signs of ASCII only.");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The service does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const error = new Error(told?.error?.message ?? `The service answered with status ${response.status}.`);
  throw Object.assign(error, { status: response.status });
}

export const call = async (path, body, signal) => (await ask(path, body, signal)).json();

// Yield the events of an answer that is streamed as server-sent events, each of which is one line of JSON here.
export async function* stream(path, body, signal) {
  const response = await ask(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("The answer ended early: the connection was closed.");
      const lines = (rest + value).split(/\r\n|\r|\n/);
      rest = lines.pop();
      for (const line of lines.filter((each) => each.startsWith("data:"))) {
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? new Error("The answer ended early: the connection was lost.") : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
