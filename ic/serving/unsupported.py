"""Fields of OpenAI's and vLLM's API that this server does not heed.

They are refused by name, because an answer that ignores them is wrong, unless their value asks for
nothing: clients send `tools: []` or `logit_bias: null` without meaning it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ic.serving.errors import invalid

# Names of fields, with the values that ask for nothing.
Unsupported = Mapping[str, tuple[Any, ...]]

_ANYWHERE: Unsupported = {
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "detokenize": (None, True),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1, 1.0),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "min_tokens": (None, 0),
    "priority": (None, 0),
    "prompt_cache_key": (None,),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "structured_outputs": (None,),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}
IN_COMPLETIONS: Unsupported = {
    **_ANYWHERE,
    "add_special_tokens": (None, True),
    "best_of": (None, 1),
    "suffix": (None,),
}
IN_CHAT: Unsupported = {
    **_ANYWHERE,
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None, False),
    "audio": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "include_reasoning": (None, False),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# What a client sends back of an answer that it got, where the answer had none of it.
IN_MESSAGES: Unsupported = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "name": (None,),
    "reasoning": (None,),
    "reasoning_content": (None,),
    "refusal": (None,),
    "tool_call_id": (None,),
    "tool_calls": (None, []),
}
IN_STREAM_OPTIONS: Unsupported = {
    "continuous_usage_stats": (None, False),
    "include_obfuscation": (None, False),
}


def supported(value: dict[str, Any], unsupported: Unsupported, path: str = "") -> dict[str, Any]:
    """A JSON object without the unsupported fields that ask for nothing.

    Args:
        path: of the object in the body, in front of its fields' names.

    Raises:
        ApiError: an unsupported field asks for something.
    """
    kept = {}
    for name, given in value.items():
        if name not in unsupported:
            kept[name] = given
        elif not any(given == each and type(given) is type(each) for each in unsupported[name]):
            raise invalid(
                f"This server does not support '{path}{name}'. Leave it out.",
                f"{path}{name}",
                "unsupported_parameter",
            )
    return kept
