"""One step of SGD on the mean over all tokens, with one forward pass per sample, without using the package."""

import copy
import random

import torch


def conversation(vocab_size, seed, num_turns):
    """
    Return the turns of a conversation in tokens, whose history loses the beginning of each completion.

    Completions have 3 to 40 tokens, so that a mean of means is far from the mean over tokens.
    """
    draw = random.Random(seed)

    def tokens(number):
        return [draw.randrange(10, vocab_size - 10) for _ in range(number)]

    history, turns = tokens(4), []
    for _ in range(num_turns):
        prompt = history + tokens(draw.randrange(2, 6))
        reasoning, answer = tokens(draw.choice([1, 5, 30])), tokens(draw.randrange(2, 10))
        turns.append({"prompt_ids": prompt, "completion_ids": reasoning + answer})
        history = prompt + answer
    return {"turns": turns}


def conversations(vocab_size, turns=(3, 1, 2, 1)):
    """Return one conversation for each number of turns."""
    return [conversation(vocab_size, seed, number) for seed, number in enumerate(turns)]


def with_weights(rows, seed=0):
    """Return the rows with a random weight for each token of the completions; some are 0."""
    draw = random.Random(seed)
    turns = [[turn | {"completion_weights": _weights(draw, turn)} for turn in row["turns"]] for row in rows]
    return [{"turns": of_row} for of_row in turns]


def _weights(draw, turn):
    of_message = draw.choice([0.5, 1.0, 3.0])
    return [of_message * draw.choice([0.0, 1.0, 2.0]) for _ in turn["completion_ids"][1:]] + [of_message]


def samples_of(rows, is_mean_of_turns=False):
    """Return every turn as `(token_ids, weights)`; for a mean over turns, the weights of each turn add up to 1."""
    samples = []
    for turn in (turn for row in rows for turn in row["turns"]):
        prompt, completion = turn["prompt_ids"], turn["completion_ids"]
        weights = turn.get("completion_weights") or [1.0] * len(completion)
        total = sum(weights) if is_mean_of_turns else 1.0
        samples.append((prompt + completion, [0.0] * len(prompt) + [weight / total for weight in weights]))
    return samples


def mean_loss(model, samples):
    """Return the weighted mean of the losses of all tokens."""
    model = copy.deepcopy(model).eval()  # the model has no dropout
    with torch.no_grad():
        total = sum(float(_summed_loss(model, *sample)) for sample in samples)
    return total / _total_weight(samples)


def after_steps(model, *steps, learning_rate):
    """Return a copy of a model after one step of SGD on the mean loss of each list of samples."""
    model = copy.deepcopy(model).eval()
    for samples in steps:
        model.zero_grad()
        for sample in samples:
            (_summed_loss(model, *sample) / _total_weight(samples)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= learning_rate * parameter.grad
    return model


def _summed_loss(model, token_ids, weights):
    token_ids = torch.tensor([token_ids])
    logits = model(input_ids=token_ids, use_cache=False).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, token_ids[0, 1:], reduction="none")
    return (losses * torch.tensor(weights)[1:]).sum()


def _total_weight(samples):
    return sum(sum(weights) for _, weights in samples)


def assert_same_parameters(found, expected, start, tolerance=1e-6):
    """Assert that parameters (by name) equal a model's, and that training moved them far more than the tolerance."""
    largest_move = 0.0
    for name, value in expected.named_parameters():
        after, before = value.detach(), start.get_parameter(name).detach()
        error = float((found[name].detach() - after).abs().max())
        assert error <= tolerance, f"{name} is off by {error:.1e}"
        largest_move = max(largest_move, float((before - after).abs().max()))
    assert largest_move > 1000 * tolerance
