"""LlamaIndex's OpenAILike and OpenAILikeEmbedding: ``python client_llama_index.py URL MODEL``."""

import json
import sys
from importlib.metadata import version
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: Literal["Oslo", "Rome"]
    age: int


def weather(place: Literal["Oslo", "Rome"]) -> str:
    """The weather of a place."""
    return place


url, model = sys.argv[1:]
llm = OpenAILike(
    model=model,
    api_base=url,
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    temperature=0,
    max_tokens=60,
    max_retries=0,
)
messages = [ChatMessage(role="user", content="What does a cow say?")]
answer = llm.chat(messages).message.content
assert answer
assert "".join(piece.delta or "" for piece in llm.stream_chat(messages)) == answer

tool = FunctionTool.from_defaults(fn=weather)
found = llm.chat_with_tools([tool], user_msg="Is it raining?", tool_required=True)
[call] = llm.get_tool_calls_from_response(found)
assert call.tool_name == "weather" and call.tool_kwargs["place"] in ("Oslo", "Rome"), call
*_, last = llm.stream_chat_with_tools([tool], user_msg="Is it raining?", tool_required=True)
[same] = llm.get_tool_calls_from_response(last)
assert (same.tool_name, same.tool_kwargs) == (call.tool_name, call.tool_kwargs)

assert isinstance(llm.as_structured_llm(City).chat(messages).raw, City)

embedding = OpenAILikeEmbedding(model_name=model, api_base=url, api_key="none")
assert len(embedding.get_text_embedding_batch(["a cow", "a ship"])) == 2

tried = ["chat", "streaming", "tools", "structured output", "embeddings"]
print(json.dumps({"version": version("llama-index-llms-openai-like"), "tried": tried}))
