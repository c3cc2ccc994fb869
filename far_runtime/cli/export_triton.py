"""`far export-triton`: a model repository for NVIDIA Triton Inference Server."""

from __future__ import annotations

from pathlib import Path

import click

from far_runtime.images.metadata import MAX_THREADS

TENSORS = ("host", "device")


@click.command("export-triton", short_help="Make a model repository for Triton Inference Server.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder, which must be new.")
@click.option("--name", default="", metavar="NAME", help="Of the model to ask. Default: the name of BUNDLE's folder.")
@click.option(
    "--engine",
    default="onnxruntime",
    show_default=True,
    metavar="NAME",
    help="onnxruntime (:cuda, :tensorrt, :openvino), or tensorrt with what far build made.",
)
@click.option(
    "--plans", metavar="NAME", help="Which of far build's engines, as far inspect lists them. Default: newest."
)
@click.option("--gpu", "gpus", multiple=True, type=click.IntRange(0), help="Device; may be repeated. Default: all.")
@click.option("--instances", type=click.IntRange(1, 64), default=1, show_default=True, help="Of each stage.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Of a stage on the CPU. Default: all cores.")
@click.option("--loops", type=click.IntRange(1, 64), default=1, show_default=True, help="Batches drawn at a time.")
@click.option("--max-batch", type=click.IntRange(1, 4096), default=8, show_default=True, help="Pictures of a batch.")
@click.option(
    "--max-wait",
    type=click.FloatRange(0, 10_000),
    default=10.0,
    show_default=True,
    metavar="MS",
    help="Milliseconds for which a request waits for company in its batch.",
)
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--tensors",
    type=click.Choice(TENSORS),
    default=TENSORS[0],
    show_default=True,
    help="Where tensors are between stages on a GPU. device: fewer copies, but no first step or prompt is remembered.",
)
@click.option(
    "--copy", is_flag=True, help="A copy of the weights in every model, in place of hard links to one of them."
)
@click.option(
    "--runtime/--no-runtime", default=True, help="Whether far_runtime is copied beside the loop. Default: yes."
)
@click.option("--environment", default="", metavar="PATH", help="The loop's Python environment: EXECUTION_ENV_PATH.")
@click.option("--editing", is_flag=True, help="Also the stages that only editing calls.")
def export_triton(
    bundle: Path, output: Path, name: str, engine: str, plans: str | None, gpus: tuple[int, ...], instances: int,
    threads: int | None, loops: int, max_batch: int, max_wait: float, queue: int, tensors: str, copy: bool,
    runtime: bool, environment: str, editing: bool,
) -> None:  # fmt: skip
    """Write a model repository of BUNDLE: every stage as an ONNX or TensorRT model, and the sampling loop as a model of
    the Python backend that calls them. The server is asked for pictures by the name of the loop; docs/triton.md."""
    from far_runtime.bundle import open_bundle
    from far_runtime.triton.config import Serving, backend_of
    from far_runtime.triton.repository import Options, write_repository

    kind = backend_of(engine).kind
    if gpus and kind != "KIND_GPU":
        raise click.UsageError(f"--gpu: {engine} runs on the CPU; use --engine onnxruntime:cuda, say")
    if threads is not None and kind != "KIND_CPU":
        raise click.UsageError(f"--threads: {engine} runs on a GPU; leave it out")
    if plans is not None and engine != "tensorrt":
        raise click.UsageError("--plans: only --engine tensorrt takes what far build made")
    if tensors == "device" and kind != "KIND_GPU":
        raise click.UsageError(f"--tensors device: {engine} runs on the CPU; leave it out")
    serving = Serving(gpus, instances, threads, loops, max_batch, max_wait, queue, tensors, environment)
    options = Options(name, engine, plans, copy, runtime, editing, serving)
    model = write_repository(open_bundle(bundle), output, options, click.echo)
    click.echo(f"next: tritonserver --model-repository {output.absolute()}, and ask for {model}")
