"""Ask a model of Triton for a video, and write it as an animated WebP file.

    pip install 'tritonclient[grpc]' pillow
    python client.py picture.png -o video.webp seed=42 motion_bucket_id=180

Frames arrive as they are decoded. Ctrl-C cancels the request, and so does the end of this process.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

MODEL = "svd"  # `svd-trt triton` writes the model's name here


def input_of(name: str, kind: str, text: str | bytes) -> Any:
    """The input ``name`` of Triton's type ``kind``, from the text of the command line."""
    values: list[Any] = [text] if kind == "BYTES" else [float(v) if "FP" in kind else int(v) for v in text.split(",")]  # type: ignore[arg-type]
    tensor = triton.InferInput(name, [len(values)], kind)
    tensor.set_data_from_numpy(np.array(values, triton_to_np_dtype(kind)))
    return tensor


def request_video(client: Any, model: str, inputs: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """The frames of a video, uint8 ``[H, W, 3]``, and what it was made with."""
    answers: queue.Queue[Any] = queue.Queue()
    frames: list[Any] = []
    details: dict[str, Any] = {}
    client.start_stream(lambda result, error: answers.put((result, error)))
    try:
        client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        while True:
            result, error = answers.get()
            if error is not None:
                raise error
            if result.get_response().parameters["triton_final_response"].bool_param:
                return frames, details
            frames.append(result.as_numpy("frame"))
            details = json.loads(result.as_numpy("details")[0])
            print(f"frame {result.as_numpy('index')[0] + 1} of {result.as_numpy('total')[0]}", file=sys.stderr)
    finally:
        client.stop_stream(cancel_requests=True)  # nothing is left to cancel if the video is complete


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Ask Triton's model {MODEL} for a video.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("arguments", nargs="*", metavar="NAME=VALUE", help="such as seed=42 or num_frames=14")
    parser.add_argument("-o", "--output", type=Path, default=Path("video.webp"))
    parser.add_argument("--server", default="localhost:8001", help="Triton's gRPC address")
    given = parser.parse_intermixed_args()
    try:
        with triton.InferenceServerClient(given.server) as client:
            kinds = {tensor.name: tensor.datatype for tensor in client.get_model_metadata(MODEL).inputs}
            texts = dict(pair.split("=", 1) for pair in given.arguments if "=" in pair)
            if len(texts) != len(given.arguments) or not texts.keys() <= kinds.keys():
                parser.error(f"arguments are NAME=VALUE, with the names {', '.join(kinds)}")
            inputs = [input_of("image_file", "BYTES", given.picture.read_bytes())]
            inputs += [input_of(name, kinds[name], text) for name, text in texts.items()]
            frames, details = request_video(client, MODEL, inputs)
    except (InferenceServerException, OSError, ValueError) as error:
        sys.exit(str(error))
    for warning in details["warnings"]:
        print(warning, file=sys.stderr)
    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    milliseconds = round(1000 / details["arguments"]["fps"])
    pictures[0].save(given.output, save_all=True, append_images=pictures[1:], duration=milliseconds, lossless=True)
    print(f"wrote {given.output}: {len(frames)} frames, seed {details['arguments']['seed']}", file=sys.stderr)


if __name__ == "__main__":
    main()
