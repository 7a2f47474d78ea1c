// Requests to the server: a response, or one sentence about why it failed.

export class Problem extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not respond; it may have been stopped.", 0);
  }
  if (response.ok) return response.json();
  let detail;
  try {
    detail = (await response.json()).detail;
  } catch {
    detail = null;
  }
  throw new Problem(detail ?? `The server responded with status ${response.status}.`,
    response.status);
}

// The server's reason why an image did not load; null without one.
export async function reason(path) {
  try {
    return (await (await fetch(path)).json()).detail ?? null;
  } catch {
    return null;
  }
}

// A key as part of a URL, with its slashes.
export function keyPath(key) {
  return key.split("/").map(encodeURIComponent).join("/");
}

export const thumb = (key) => `/thumb/${keyPath(key)}`;
export const image = (key) => `/image/${keyPath(key)}`;
export const uploaded = (name) => `/upload/${encodeURIComponent(name)}`;
