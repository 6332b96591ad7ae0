// What the groups of checks share: what must be, and waits that end.

export const PATIENCE_MS = 10_000;      // for whatever a window is waited for; a busy machine needs a second or two
const LOOK_AGAIN_MS = 25;               // between two looks at something that the browser cannot wait for itself

// What must be true here and now; what was found instead is shown.
export function must(holds, expected, shown) {
  if (!holds) throw new Error(`${expected}${shown === undefined ? "" : `; it was ${JSON.stringify(shown)}`}`);
}

export function mustEqual(shown, wanted, what) {
  const [left, right] = [shown, wanted].map((value) => JSON.stringify(value));
  if (left !== right) throw new Error(`${what} must be ${right}; it was ${left}`);
}

// Waits until look() gives something true, and returns that.  An error of look() counts as "not
// yet", and is what is shown if patience ends.
export async function until(what, look, patience = PATIENCE_MS) {
  const end = performance.now() + patience;
  let seen, error;
  do {
    try {
      error = undefined;
      seen = await look();
      if (seen) return seen;
    } catch (caught) {
      error = caught;
    }
    await new Promise((wake) => setTimeout(wake, LOOK_AGAIN_MS));
  } while (performance.now() < end);
  throw new Error(`not seen within ${patience / 1000} s: ${what}${error ? `; ${withoutColours(error)}` : `; it was ${JSON.stringify(seen)}`}`);
}

// A promise that fails, with a clear message, if another takes longer than seconds.
export function within(seconds, what, promise) {
  let timer;
  const tooLate = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: it took more than ${seconds} s`)), seconds * 1000);
  });
  return Promise.race([promise, tooLate]).finally(() => clearTimeout(timer));
}

// Playwright paints its errors for terminals.
export function withoutColours(error) {
  return String(error?.message ?? error).replace(/\x1b\[\d+m/g, "");
}

// The median of some numbers, as the page computes it.
export function median(numbers) {
  const sorted = [...numbers].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
