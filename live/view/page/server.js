// Requests to the server. Errors have the server's sentence as their message.

async function answerOf(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    throw new Error("the viewer's program does not answer; is it still running?");
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let content = {};
  try {
    content = JSON.parse(text);
  } catch {
    content = { error: text.slice(0, 200) || `error ${answer.status}` };
  }
  throw Object.assign(new Error(content.error ?? `error ${answer.status}`), { status: answer.status, content });
}

export const json = async (address) => (await answerOf(address)).json();
export const bytes = async (address) => (await answerOf(address)).arrayBuffer();
export const blob = async (address, signal) => (await answerOf(address, { signal })).blob();

export async function put(address, value) {
  const options = { method: "PUT", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) };
  return (await answerOf(address, options)).json();
}

export async function download(address) {
  const answer = await answerOf(address);
  const name = /filename\*=UTF-8''(\S+)/.exec(answer.headers.get("Content-Disposition") ?? "")?.[1] ?? "labels";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = decodeURIComponent(name);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
