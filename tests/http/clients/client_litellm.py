"""litellm: ``python client_litellm.py URL MODEL DATA``."""

import json
import sys
from importlib.metadata import version
from typing import Literal

import litellm
from pydantic import BaseModel


class City(BaseModel):
    name: Literal["Oslo", "Rome"]
    age: int


url, model, data = sys.argv[1:]
here = {"api_base": url, "api_key": "none"}
ask = {
    "model": f"openai/{model}",
    "messages": [{"role": "user", "content": "What does a cow say?"}],
    "temperature": 0,
    "max_tokens": 60,
    **here,
}
parameters = {"type": "object", "properties": {"place": {"enum": ["Oslo"]}}, "required": ["place"]}
tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]

answer = litellm.completion(**ask).choices[0].message.content
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]
assert answer and "".join(pieces) == answer

choice = {"type": "function", "function": {"name": "weather"}}
forced = {**ask, "tools": tools, "tool_choice": choice}
[call] = litellm.completion(**forced).choices[0].message.tool_calls
assert call.function.name == "weather" and json.loads(call.function.arguments) == {"place": "Oslo"}
chunks = list(litellm.completion(**forced, stream=True))
[same] = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
assert (same.function.name, same.function.arguments) == ("weather", call.function.arguments)

found = litellm.completion(**ask, response_format=City).choices[0].message.content
City.model_validate_json(found)

for encoding in ("float", "base64"):
    found = litellm.embedding(
        model=f"openai/{model}", input=["a cow", "a ship"], encoding_format=encoding, **here
    )
    assert len(found.data) == 2

openai = {"custom_llm_provider": "openai", **here}
with open(data, "rb") as file:
    uploaded = litellm.create_file(file=file, purpose="fine-tune", **openai)
job = litellm.create_fine_tuning_job(
    model=model,
    training_file=uploaded.id,
    suffix="litellm",
    extra_body={"fwdllm": {"rank": 1}},
    **openai,
)
assert litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job.id, **openai).id == job.id
ended = litellm.cancel_fine_tuning_job(fine_tuning_job_id=job.id, **openai)
assert ended.status == "cancelled"

tried = ["chat", "streaming", "tools", "structured output", "embeddings", "files", "jobs"]
print(json.dumps({"version": version("litellm"), "tried": tried}))
