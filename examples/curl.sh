#!/bin/sh
# What can be asked with curl. Usage: curl.sh [URL], by default http://127.0.0.1:8000
set -eu
url=${1:-http://127.0.0.1:8000}

post() {
    printf '\n\n# POST %s %s\n' "$1" "$2"
    curl --silent --show-error --fail-with-body --no-buffer "$url$1" -H 'Content-Type: application/json' -d "$2"
}

get() {
    printf '\n\n# GET %s\n' "$1"
    curl --silent --show-error --fail-with-body "$url$1"
}

get /health
get /v1/models

# A chat. The "tandem" object of the answer says how it was made: engines, times, blocks and bytes moved.
post /v1/chat/completions '{"messages": [{"role": "user", "content": "Reverse: tandem"}], "temperature": 0}'

# Text in, text out.
post /v1/completions '{"prompt": "Sort: tandem", "max_tokens": 8, "temperature": 0}'

# As it comes, with the usage at the end.
post /v1/chat/completions '{"messages": [{"role": "user", "content": "Sort: qfkz"}], "temperature": 0,
    "stream": true, "stream_options": {"include_usage": true}}'

# Token ids in, token ids out.
post /v1/completions '{"prompt": [72, 69, 76, 76, 79], "max_tokens": 4, "temperature": 0, "return_token_ids": true}'

# Engines with their KV blocks, and what a Prometheus server would scrape. (A foreign proxy has neither.)
get /tandem/engines || true
get /metrics | grep -i -e '^tandem.*kv' -e 404 || true
