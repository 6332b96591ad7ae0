// What the scripts here share: a line for each check, and an end for everything that may wait.

// Prints what has been found to hold; ends the script if it does not.
export function check(what, holds, shown) {
  if (!holds) {
    throw new Error(`${what}${shown === undefined ? "" : `; it was ${JSON.stringify(shown)}`}`);
  }
  console.log(`  ok  ${what}`);
}

// A promise that fails, with a clear message, if another takes longer than seconds.
export function within(seconds, what, promise) {
  let timer;
  const tooLate = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: nothing came within ${seconds} s`)), seconds * 1000);
  });
  return Promise.race([promise, tooLate]).finally(() => clearTimeout(timer));
}

// Runs a script's main function: exit status 1 if it fails, or takes longer than seconds.
export async function run(name, seconds, main) {
  try {
    await within(seconds, name, main());
    console.log(`${name}: all well`);
  } catch (error) {
    console.error(`${name} FAILED: ${error.stack || error}`);
    process.exitCode = 1;
  }
  process.exit();           // what still waits for the server must not keep us
}
