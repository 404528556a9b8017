"""The table of `bench.updates`, from its JSON alone: readable where the trainer's packages are absent."""

from bench.report import short, table

MFU_GOAL = 45  # per cent


def updates_table(document: dict) -> str:
    header = ["policy", "variant", "rows", "discriminator s", "score s", "policy s", "tokens/s", "peak MiB", "MFU"]
    lines = [
        [
            row["policy"],
            row["variant"],
            str(row["rows"]),
            *(short(row["seconds"][p]) if p in row["seconds"] else "–" for p in ("discriminator", "score", "policy")),
            short(row["tokens_per_s"]),
            "–" if row["peak_mib"] is None else short(row["peak_mib"]),
            "–" if row["model_flops_utilisation"] is None else f"{100 * row['model_flops_utilisation']:.0f} %",
        ]
        for row in document["rows"]
    ]
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in document["shape"].items())
    kernels = sorted({f"{row['variant']}: {row['backend']}" for row in document["rows"]})
    title = f"{document['device']}; {sizes}; LoRA; GEMM {document['gemm_tflops']:.3g} TFLOP/s"
    return "\n".join([title, table(header, lines), *kernels])
