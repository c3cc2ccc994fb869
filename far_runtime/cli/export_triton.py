"""`far export-triton`: a model repository for NVIDIA Triton Inference Server."""

from __future__ import annotations

from pathlib import Path

import click

from far_runtime.images.metadata import MAX_THREADS

TENSORS = ("host", "device")


@click.command("export-triton", short_help="Make a model repository for Triton Inference Server.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write; a new one.")
@click.option(
    "--name", default="", metavar="NAME", help="Name of the model to ask. Default: the name of BUNDLE's folder."
)
@click.option(
    "--engine",
    default="onnxruntime",
    show_default=True,
    metavar="NAME",
    help="What runs the stages: onnxruntime (:cuda, :tensorrt, :openvino), or tensorrt with what far build made.",
)
@click.option(
    "--plans", metavar="NAME", help="Which of far build's engines to use, as far inspect lists them. Default: newest."
)
@click.option("--gpu", "gpus", multiple=True, type=click.IntRange(0), help="A GPU; may be repeated. Default: all.")
@click.option("--instances", type=click.IntRange(1, 64), default=1, show_default=True, help="Instances of each stage.")
@click.option(
    "--threads", type=click.IntRange(1, MAX_THREADS), help="Threads of a stage on the CPU. Default: all cores."
)
@click.option(
    "--loops",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes of the loop, each of which draws one batch at a time.",
)
@click.option("--max-batch", type=click.IntRange(1, 4096), default=8, show_default=True, help="Pictures of a batch.")
@click.option(
    "--max-wait",
    type=click.FloatRange(0, 10_000),
    default=10.0,
    show_default=True,
    metavar="MS",
    help="How long a request waits for others to fill its batch, in milliseconds.",
)
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--tensors",
    type=click.Choice(TENSORS),
    default=TENSORS[0],
    show_default=True,
    help="Where tensors stay between stages on a GPU. device: fewer copies, but what depends on a label or prompt "
    "alone is computed again for every batch.",
)
@click.option("--copy", is_flag=True, help="Give every model its own copy of the weights, in place of hard links.")
@click.option(
    "--runtime/--no-runtime", default=True, help="Whether to copy far_runtime beside the loop. Default: copy it."
)
@click.option(
    "--environment", default="", metavar="PATH", help="Python environment of the loop (Triton's EXECUTION_ENV_PATH)."
)
@click.option("--editing", is_flag=True, help="Export the stages that only editing uses, too.")
def export_triton(
    bundle: Path, output: Path, name: str, engine: str, plans: str | None, gpus: tuple[int, ...], instances: int,
    threads: int | None, loops: int, max_batch: int, max_wait: float, queue: int, tensors: str, copy: bool,
    runtime: bool, environment: str, editing: bool,
) -> None:  # fmt: skip
    """Write a model repository of BUNDLE for NVIDIA Triton Inference Server.

    Every stage becomes an ONNX or TensorRT model, and the sampling loop becomes a model of the Python backend that
    calls them. Clients ask for pictures by the name of the loop's model. See docs/triton.md."""
    from far_runtime.bundle import open_bundle
    from far_runtime.triton.config import ServingConfig, get_backend
    from far_runtime.triton.repository import RepositoryOptions, write_repository

    kind = get_backend(engine).kind
    if gpus and kind != "KIND_GPU":
        raise click.UsageError(f"--gpu: {engine} runs on the CPU; use --engine onnxruntime:cuda, say")
    if threads is not None and kind != "KIND_CPU":
        raise click.UsageError(f"--threads: {engine} runs on a GPU; leave it out")
    if plans is not None and engine != "tensorrt":
        raise click.UsageError("--plans: only --engine tensorrt uses what far build made")
    if tensors == "device" and kind != "KIND_GPU":
        raise click.UsageError(f"--tensors device: {engine} runs on the CPU; leave it out")
    serving = ServingConfig(
        gpus=gpus,
        instances=instances,
        threads=threads,
        loops=loops,
        max_batch=max_batch,
        max_wait_ms=max_wait,
        max_queue=queue,
        tensors=tensors,
        environment=environment,
    )
    options = RepositoryOptions(
        name=name, engine=engine, plans=plans, copy=copy, runtime=runtime, editing=editing, serving=serving
    )
    model = write_repository(open_bundle(bundle), output, options, click.echo)
    click.echo(f"next: tritonserver --model-repository {output.absolute()}, and ask for {model}")
