// The browser of the checks and of the pictures.

import { chromium } from "playwright-core";

const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync"];

// A headless Chromium, as its users have it: pages come back from the back-forward cache, and ours must cope.
export function startBrowser() {
  return chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: FLAGS,
                           ignoreDefaultArgs: ["--disable-back-forward-cache"] });
}
