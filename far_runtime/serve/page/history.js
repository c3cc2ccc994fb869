// What was drawn, kept in the browser alone.

const KEY = "far-deploy-history", MOST = 40;

export function entries() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY));
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

export function remember(entry) {
  const kept = [entry, ...entries()].slice(0, MOST);
  while (kept.length) {
    try {
      localStorage.setItem(KEY, JSON.stringify(kept));
      return;
    } catch { // full: the oldest goes
      kept.pop();
    }
  }
}

export function forget() {
  try {
    localStorage.removeItem(KEY);
  } catch { /* a browser that keeps nothing */ }
}

function quoted(text) {
  return /^[\w.,:=/-]+$/.test(text) ? text : `'${String(text).replaceAll("'", String.raw`'\''`)}'`;
}

// The command that draws the same picture.
export function commandLine(settings, engine) {
  const parts = ["far generate BUNDLE"];
  if (settings.label !== null) parts.push(`--label ${settings.label}`);
  else parts.push(`--prompt ${quoted(settings.name)}`);
  if (settings.negative) parts.push(`--negative ${quoted(settings.negative)}`);
  parts.push(`--seed ${settings.seed}`);
  for (const [name, value] of Object.entries(settings.sampling)) {
    if (value !== null) parts.push(`--${name.replaceAll("_", "-")} ${quoted([value].flat().join(","))}`);
  }
  return [...parts, `--engine ${quoted(engine)}`].join(" ");
}
