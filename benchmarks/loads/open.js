// For k6: texts of 10 words in an open loop, RATE a second for SECONDS. Iterations start evenly and each waits a random
// moment of up to two seconds first, which makes of even arrivals, near enough, a Poisson process.
import http from "k6/http";
import { sleep } from "k6";
import { Trend, Counter } from "k6/metrics";

const words = ("the river ran quietly under an old stone bridge while children played near willow trees and birds sang " +
  "songs of spring morning market opened slowly bread fresh coffee people walked city light window garden book story " +
  "music winter summer train").split(" ");
const latency = new Trend("answer_ms", true);
const failed = new Counter("answers_failed");

export const options = {
  scenarios: {
    open: {
      executor: "constant-arrival-rate",
      rate: Number(__ENV.RATE),
      timeUnit: "1s",
      duration: `${__ENV.SECONDS}s`,
      preAllocatedVUs: Number(__ENV.RATE) * 3,
      maxVUs: Number(__ENV.RATE) * 8,
    },
  },
  summaryTrendStats: ["p(50)", "p(99)"],
};

export default function () {
  sleep(Math.random() * 2);
  const text = Array.from({ length: 10 }, () => words[Math.floor(Math.random() * words.length)]).join(" ");
  const answer = http.post(`http://127.0.0.1:${__ENV.PORT}/v1/embeddings`, JSON.stringify({ input: [text] }), {
    headers: { "Content-Type": "application/json" },
  });
  latency.add(answer.timings.duration);
  if (answer.status !== 200) failed.add(1);
}

export function handleSummary(data) {
  const trend = data.metrics.answer_ms.values;
  const failures = data.metrics.answers_failed ? data.metrics.answers_failed.values.count : 0;
  return {
    stdout: `JSON {"requests": ${data.metrics.iterations.values.count}, "seconds": ${__ENV.SECONDS}, ` +
      `"p50_ms": ${trend["p(50)"]}, "p99_ms": ${trend["p(99)"]}, "errors": ${failures}}\n`,
  };
}
