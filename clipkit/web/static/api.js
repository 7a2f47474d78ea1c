// Asking the server: an answer, or one sentence about why there is none.

export class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer; it may have been stopped.", 0);
  }
  if (response.ok) return response.json();
  let detail;
  try {
    detail = (await response.json()).detail;
  } catch {
    detail = null;
  }
  throw new Problem(detail ?? `The server answered with status ${response.status}.`,
    response.status);
}

// Why a picture did not come, as the server says it; null where it says nothing.
export async function reason(path) {
  try {
    return (await (await fetch(path)).json()).detail ?? null;
  } catch {
    return null;
  }
}

// A key as part of an address, its slashes kept.
export function keyPath(key) {
  return key.split("/").map(encodeURIComponent).join("/");
}

export const thumb = (key) => `/thumb/${keyPath(key)}`;
export const image = (key) => `/image/${keyPath(key)}`;
export const sent = (name) => `/sent/${encodeURIComponent(name)}`;
