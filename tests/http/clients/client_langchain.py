"""LangChain's ChatOpenAI and OpenAIEmbeddings: ``python client_langchain.py URL MODEL``."""

import json
import sys
from importlib.metadata import version
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class City(BaseModel):
    name: Literal["Oslo", "Rome"]
    age: int = Field(ge=0, le=999)


@tool
def weather(place: Literal["Oslo", "Rome"]) -> str:
    """The weather of a place."""
    return place


url, model = sys.argv[1:]
options = {"base_url": url, "api_key": "none", "model": model}
chat = ChatOpenAI(**options, temperature=0, max_tokens=60, stream_usage=True)
embeddings = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)

answer = chat.invoke("What does a cow say?")
assert answer.content and answer.usage_metadata["output_tokens"] > 0
pieces = list(chat.stream("What does a cow say?"))
assert "".join(piece.content for piece in pieces) == answer.content
assert len(pieces) > 3

forced = chat.bind_tools([weather], tool_choice="weather")
[call] = forced.invoke("Is it raining?").tool_calls
assert call["name"] == "weather" and call["args"]["place"] in ("Oslo", "Rome"), call
whole = None
for piece in forced.stream("Is it raining?"):
    whole = piece if whole is None else whole + piece
assert whole.tool_calls[0]["name"] == "weather" and whole.tool_calls[0]["args"] == call["args"]
[call] = chat.bind_tools([weather], tool_choice="any").invoke("Is it raining?").tool_calls
assert call["name"] == "weather"

for method in ("json_schema", "function_calling"):
    found = chat.with_structured_output(City, method=method).invoke("Name a city.")
    assert isinstance(found, City), found

vectors = embeddings.embed_documents(["a cow", "a ship"])
assert len(vectors) == 2 and abs(sum(x * x for x in vectors[0]) - 1) < 1e-3
short = OpenAIEmbeddings(**options, check_embedding_ctx_length=False, dimensions=8)
assert len(short.embed_query("a cow")) == 8

tried = ["chat", "streaming", "tools", "structured output", "embeddings"]
print(json.dumps({"version": version("langchain-openai"), "tried": tried}))
