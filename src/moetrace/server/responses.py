"""What `/generate` answers, with LightLLM's names. Runs in worker threads: one long sequence must not delay others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from moetrace.engines.requests import GenerateResult
from moetrace.server.archive import Archive
from moetrace.server.bodies import Body, encode_json
from moetrace.server.payloads import routes_of
from moetrace.server.schemas import GenerateParameters
from moetrace.server.texts import Tokenizer

Item = TypeVar("Item")


def encode_responses(
    results: Sequence[Sequence[GenerateResult]],
    is_batch: bool,
    parameters: GenerateParameters,
    tokenizer: Tokenizer | None,
    archive: Archive,
) -> Body:
    """JSON of the sequences of each prompt: one response, or for a list of prompts a list of them."""
    responses = [response_of(sequences, parameters, tokenizer, archive) for sequences in results]
    return encode_json(responses if is_batch else responses[0])


def response_of(
    sequences: Sequence[GenerateResult], parameters: GenerateParameters, tokenizer: Tokenizer | None, archive: Archive
) -> dict[str, Any]:
    """The response of one prompt. As in LightLLM, what is said of a sequence is a list where there are several."""

    def each(values: Sequence[Item]) -> Item | list[Item]:
        return values[0] if len(sequences) == 1 else list(values)

    prompt, counts = sequences[0].prompt_tokens, [len(sequence.output_tokens) for sequence in sequences]
    response: dict[str, Any] = {
        "generated_text": None if tokenizer is None else [text_of(s, parameters, tokenizer) for s in sequences],
        "count_output_tokens": each(counts),
        "finish_reason": each([sequence.finish_reason for sequence in sequences]),
        "prompt_tokens": len(prompt),
        "prompt_token_ids": prompt,
        "output_token_ids": each([sequence.output_tokens for sequence in sequences]),
        "weight_version": each([sequence.weight_version for sequence in sequences]),
        "usage": usage_of(sequences),
    }
    if parameters.return_details:
        response["tokens"] = each([details_of(sequence, tokenizer) for sequence in sequences])
    if sequences[0].prompt_logprobs is not None:
        response["prompt_logprobs"] = sequences[0].prompt_logprobs
    traces = [sequence.trace for sequence in sequences if sequence.trace is not None]
    if traces:
        response["routed_experts"] = each(
            [routes_of(trace, parameters, parameters.routed_experts_start, archive) for trace in traces]
        )
    return response


def usage_of(sequences: Sequence[GenerateResult]) -> dict[str, int]:
    """How many tokens the sequences of one prompt took."""
    prompt, output = len(sequences[0].prompt_tokens), sum(len(sequence.output_tokens) for sequence in sequences)
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def text_of(sequence: GenerateResult, parameters: GenerateParameters, tokenizer: Tokenizer) -> str:
    """The generated text of a sequence."""
    return tokenizer.decode(sequence.output_tokens, skip_special_tokens=parameters.skip_special_tokens)


def details_of(sequence: GenerateResult, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """Id, text, log-probability and kind of each output token."""
    return [
        token_of(token, logprob, tokenizer)
        for token, logprob in zip(sequence.output_tokens, sequence.logprobs, strict=True)
    ]


def token_of(token: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One output token, decoded by itself."""
    return {
        "id": token,
        "text": None if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False),
        "logprob": logprob,
        "special": None if tokenizer is None else token in tokenizer.all_special_ids,
    }
