"""The ensembles: `everything`, which is in the template, and those derived from it here."""

from tritonclient.grpc.model_config_pb2 import ModelConfig

WHOLE = "everything"
# The outputs of each part. `analyze` has all but `neck`, which is six times the rest.
PARTS = {
    "classify": ("scores", "indices", "labels"),
    "probabilities": ("probabilities",),
    "embed": ("embedding",),
    "features": ("neck",),
    "analyze": ("scores", "indices", "labels", "probabilities", "embedding"),
}


def part(whole: ModelConfig, name: str) -> ModelConfig:
    """Return `whole` reduced to the outputs of the part `name` and the steps they need.

    Requesting only these outputs from `whole` gives the same numbers, but costs more: Triton
    requests all outputs in each step's output_map (EnsembleContext::InitStep of
    triton-inference-server/core), and unused ones are copied and discarded.
    """
    config = ModelConfig()
    config.CopyFrom(whole)
    config.name = name
    needed = set(PARTS[name])
    del config.output[:]
    config.output.extend(output for output in whole.output if output.name in needed)
    steps = config.ensemble_scheduling.step
    for i in reversed(range(len(steps))):
        for output, tensor in list(steps[i].output_map.items()):
            if tensor not in needed:
                del steps[i].output_map[output]
        if steps[i].output_map:
            needed.update(steps[i].input_map.values())
        else:
            del steps[i]
    return config
