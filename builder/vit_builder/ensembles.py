"""The ensembles: `everything`, which is in the template, and the parts of it that are made here."""

from tritonclient.grpc.model_config_pb2 import ModelConfig

WHOLE = "everything"
# Of each part the outputs. `analyze` is all but `neck`, which is six times the rest.
PARTS = {
    "classify": ("scores", "indices", "labels"),
    "probabilities": ("probabilities",),
    "embed": ("embedding",),
    "features": ("neck",),
    "analyze": ("scores", "indices", "labels", "probabilities", "embedding"),
}


def part(whole: ModelConfig, name: str) -> ModelConfig:
    """`whole` with the outputs of the part `name`, and the steps that lead to them.

    A request to `whole` that names these outputs gets the same numbers, but costs more: Triton asks
    each step that runs for all that is in its output_map (EnsembleContext::InitStep of
    triton-inference-server/core), and what nobody wants is copied and thrown away.
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
