#!/bin/sh
# A winner on this machine: sweep -> winner -> gate -> promote -> serve -> answer -> trace.
#
#   sh examples/winner.sh             in the repository's folder, after `make setup`
#
# LLaVA's first stage is trained for 10 steps: the first champion. A sweep trains it longer, and its
# best trial must pass the gate of examples/winner_gate.toml. The last line is the winner's figure.
set -eu
PATH=$PWD/.venv/bin:$PATH
BRIDGEWORK_HOME=$(mktemp -d)
export BRIDGEWORK_HOME
PORT=${PORT:-8017}
began=$(date +%s)

echo "home      $BRIDGEWORK_HOME"
say() { printf '\n== %s (%s s)\n' "$1" "$(($(date +%s) - began))"; }

say "train the first champion"
bridgework train llava:quickstart --stage warm --run first --workers 0 \
  --set stages.warm.budget.steps=10
bridgework promote llava:1

say "sweep"
bridgework sweep llava_warm --run sweep

say "compare and promote the winner"
bridgework compare llava llava@challenger
winner=$(bridgework compare llava llava@challenger --json | python -c '
import json, sys
one = json.load(sys.stdin)["retrieval.text_to_image_r10"]
print("retrieval.text_to_image_r10 %.3f, %+.3f [%.3f, %.3f] over the champion, n=%d"
      % (one["b"], one["value"], one["low"], one["high"], one["n"]))')
bridgework promote llava@challenger --gate examples/winner_gate.toml
bridgework history llava

say "serve and ask"
log=$BRIDGEWORK_HOME/serve.log
bridgework serve chat model=llava dev=true --port "$PORT" >"$log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server || true' EXIT
answer=$(PORT=$PORT LOG=$log python - <<'PYTHON'
import base64, io, os, time
import httpx
from openai import OpenAI
from bridgework.data.dataset import open_dataset

url = f"http://127.0.0.1:{os.environ['PORT']}"
for _ in range(300):
    try:
        if httpx.get(f"{url}/health", timeout=2).is_success:
            break
    except httpx.HTTPError:
        pass
    time.sleep(1)
else:
    raise SystemExit(f"the endpoint did not answer; see {os.environ['LOG']}")
image = next(open_dataset("examples/data/heldout_style").samples()).images[0]
data = f"data:image/png;base64,{base64.b64encode(image).decode()}"
content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": "What is this?"}]
reply = OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(
    model="llava", messages=[{"role": "user", "content": content}], max_tokens=12
)
print(reply.id)
PYTHON
)
echo "response  $answer"

say "trace the answer to its data"
bridgework trace "$answer"

say "done"
echo "winner    $winner"
