-- For wrk: texts of a log-normal number of words, from 3 to 250, each text another.
local words = {"the","river","ran","quietly","under","an","old","stone","bridge","while","children","played","near",
  "willow","trees","and","birds","sang","songs","of","spring","morning","market","opened","slowly","bread","fresh",
  "coffee","people","walked","city","light","window","garden","book","story","music","winter","summer","train"}

function init(args)
  math.randomseed(tonumber(args[1] or "1"))
end

local function normal()
  return math.sqrt(-2 * math.log(1 - math.random())) * math.cos(2 * math.pi * math.random())
end

function request()
  local text = {}
  local count = math.min(250, math.max(3, math.floor(math.exp(3.2 + normal()))))
  for i = 1, count do text[i] = words[math.random(#words)] end
  return wrk.format("POST", "/v1/embeddings", {["Content-Type"] = "application/json"},
    '{"input": ["' .. table.concat(text, " ") .. '"]}')
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('JSON {"requests": %d, "seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
