# SPDX-License-Identifier: Apache-2.0
"""Runs a MONAI Label server with the bundle, end to end through HTTP.

Masks, state, settings, restart, many requests at once; annotations saved through it, and a site commissioned on them.

``make label-test`` runs it in MONAI Label's environment. It prints a line per check and ends with an error at the first
that fails.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import requests
from PIL import Image

from mgipt_monai.data import CAMERAS
from mgipt_monai.data.demo.stream import write_demo_site
from mgipt_monai.label_app import write_label_bundle

ROOT = Path(__file__).parents[1]
NAME = "mgipt_segmentation"
TOLD = ("corrected", "monitor")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "label"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


def python(*arguments: object) -> None:
    """Run a module of this environment to its end."""
    command = [sys.executable, "-W", "ignore", "-m", *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])


class Client:
    """Asks a server for masks and answers."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def infer(self, image: str | Path, output: str, **params: Any) -> requests.Response:
        """Post an image of the studies (by its name) or a file."""
        ask = {"output": output, **({"image": image} if isinstance(image, str) else {})}
        files = {} if isinstance(image, str) else {"file": (image.name, image.read_bytes())}
        data = {"params": json.dumps(params)}
        return requests.post(f"{self.url}/infer/{NAME}", params=ask, files=files, data=data, timeout=120)

    def mask(self, image: str | Path, **params: Any) -> np.ndarray:
        """Return the grey values of the mask of a photograph."""
        response = self.infer(image, "image", **params)
        response.raise_for_status()
        return np.asarray(Image.open(BytesIO(response.content)))

    def position(self, image: str | Path, **params: Any) -> int:
        """Return after how many images the stream stands, as the JSON answer says."""
        response = self.infer(image, "json", **params)
        response.raise_for_status()
        return response.json()["adaptation"]["position"]

    def save(self, image: str, label: Path) -> None:
        """Save the final annotation of an image of the studies."""
        ask, files = {"image": image, "tag": "final"}, {"label": (label.name, label.read_bytes())}
        requests.put(f"{self.url}/datastore/label", params=ask, files=files, timeout=60).raise_for_status()


@contextmanager
def server(app: Path, studies: Path, log: Path) -> Iterator[Client]:
    """Start a server on a free port, and stop it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", app, "--studies", studies]
    command += ["--host", "127.0.0.1", "--port", str(port), "--conf", "models", NAME]
    command += ["--conf", "skip_trainers", "true", "--conf", "zoo_source", "local"]
    with log.open("a") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        client = Client(port)
        for _ in range(120):
            time.sleep(1)
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            try:
                requests.get(f"{client.url}/info/", timeout=60).raise_for_status()
                break
            except requests.ConnectionError:
                continue
        yield client
    finally:
        process.terminate()
        process.wait(30)


def check(what: str, holds: bool) -> None:
    """Print a check, or end with it."""
    if not holds:
        raise SystemExit(f"FAILED: {what}")
    print(f"ok: {what}", flush=True)


def check_log(log: Path, words: str) -> None:
    """Check that a server's log says something; it is written after the answer."""
    for _ in range(20):
        if words in log.read_text():
            break
        time.sleep(0.5)
    check(f"the log says: {words}", words in log.read_text())


def masks_in(folder: Path, names: list[str]) -> list[np.ndarray]:
    """Return the grey values of written masks."""
    return [np.asarray(Image.open(folder / f"{name}.png")) for name in names]


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether masks are the same, pixel by pixel."""
    return all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def first_server(folder: Path, app: Path, studies: Path, log: Path) -> None:
    """Masks, what a request may set, bad images."""
    adaptation = app / "model" / NAME / "adaptation"
    python("monai.bundle", "run", "--config_file", "bundle/configs/inference.yaml", "--bundle_root", "bundle",
           "--dataset_dir", studies, "--output_dir", folder / "run")  # fmt: skip
    with server(app, studies, log) as client:
        config = requests.get(f"{client.url}/info/", timeout=60).json()["models"][NAME]["config"]
        check("/info shows adapt, reset and lr", {"adapt", "reset", "lr"} <= set(config))

        names = sorted(path.stem for path in studies.glob("*.png"))
        masks = [client.mask(name) for name in names]
        same = all_equal(masks, masks_in(folder / "run", names))
        check(f"{len(names)} masks are those of a bundle run, pixel by pixel", same)
        served, run = (
            [row["loss_after"] for row in rows_in(path)]
            for path in (adaptation / "records.jsonl", folder / "run" / "records.jsonl")
        )
        check("so are the losses in the records", served == run)

        before = {path.name: path.read_bytes() for path in adaptation.iterdir()}

        def untouched() -> bool:
            return {path.name: path.read_bytes() for path in adaptation.iterdir()} == before

        tall, bad, volume = folder / "tall.png", folder / "bad.png", folder / "slice.nii.gz"
        photograph = Image.open(studies / f"{names[0]}.png").resize((60, 90))
        photograph.save(tall)
        Image.new("RGB", (60, 90)).save(bad)
        affine = np.diag([0.5, 0.7, 3.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(np.asarray(photograph, np.float32)[:, :, None], affine), volume)

        twice = [client.mask(tall, adapt=False) for _ in range(2)]
        check("an upload of 60 x 90 pixels gives such a mask", twice[0].shape == (90, 60))
        check("adapt false gives the same mask twice", np.array_equal(*twice) and twice[0].any())
        answer = client.infer(volume, "image", adapt=False).content
        (folder / "answer.nii.gz").write_bytes(answer)
        label = nibabel.load(folder / "answer.nii.gz")
        check("a NIfTI slice comes back as one", label.shape == (90, 60, 1) and np.allclose(label.affine, affine))
        check("a constant image is an error", client.infer(bad, "json").status_code == 500)
        check_log(log, "the image is constant, there is nothing to adapt to")
        check("another lr is an error", client.infer(tall, "json", lr=0.01).status_code == 500)
        check_log(log, "instance_prompt.lr was 0.05, is 0.01")
        check("none of this changed state or records", untouched())
        check("the stream goes on", client.position(tall) == len(names) + 1)
        check("reset begins anew, with another lr", client.position(tall, reset=True, lr=0.01) == 1)
        check("the new stream goes on", client.position(tall, lr=0.01) == 2)
        check("reset again", client.position(tall, reset=True) == 1)


def second_server(folder: Path, app: Path, studies: Path, log: Path) -> None:
    """Restart, many requests at once, and a third process."""
    state = app / "model" / NAME / "adaptation" / "stream.pt"
    with server(app, studies, log) as client:
        check("a restarted server goes on", client.position("eye_000") == 2)
        with ThreadPoolExecutor(8) as threads:
            positions = sorted(threads.map(lambda i: client.position(f"eye_{i % 3:03d}"), range(8)))
        check("of 8 requests at once none is lost", positions == list(range(3, 11)))
        size = state.stat().st_size
        check(
            "the state's size is that of one image's", client.position("eye_000") == 11 and state.stat().st_size == size
        )
        with server(app, studies, folder / "other.log") as other:
            check("another server on the same stream is refused", other.infer("eye_000", "json").status_code == 500)
        check_log(folder / "other.log", "another process adapts with")


def commissioned_on(studies: Path, site: Path, names: list[str]) -> bool:
    """Commission a site on the annotations that a server has saved so far; return whether a gain is certified."""
    python("mgipt_monai", "commission", studies, site)
    report = json.loads((site / "commissioning.json").read_text())
    print(f"    {report['statement']}")
    check(f"the site is commissioned on {len(names)}", [case["name"] for case in report["cases"]] == names)
    return bool(report["certified"])


def annotated_server(folder: Path, app: Path, photographs: Path, log: Path) -> None:
    """Save corrected annotations through a server, and commission the site on them as they accumulate."""
    studies, corrected = photographs / "images", photographs / "masks"
    names = sorted(path.stem for path in studies.glob("*.png"))
    with server(app, studies, log) as client:
        drawn = client.mask(names[0], adapt=False, reset=True)
        annotation = np.asarray(Image.open(corrected / f"{names[0]}.png"))
        check("masks and annotations have the same values", set(np.unique(drawn)) == set(np.unique(annotation)))
        for name in names[:6]:
            client.save(name, corrected / f"{name}.png")
        commissioned_on(studies, folder / "site", names[:6])
        for name in names[6:10]:
            client.save(name, corrected / f"{name}.png")
        known = requests.get(f"{client.url}/datastore/", params={"output": "train"}, timeout=60).json()
        check("the server knows ten final annotations", len(known) == 10)
        check("with which a gain is certified", commissioned_on(studies, folder / "site", names[:10]))


def commissioned_server(folder: Path, app: Path, photographs: Path, log: Path) -> None:
    """Serve the commissioned method."""
    studies, adaptation = photographs / "images", app / "model" / NAME / "adaptation"
    names = sorted(path.stem for path in studies.glob("*.png"))
    overlay = folder / "site" / "site.yaml"
    python("mgipt_monai", "label-app", "--app", app, "--overlays", overlay)
    python("mgipt_monai", "predict", studies, folder / "predicted", "--config", overlay)
    with server(app, studies, log) as client:
        check("the stream of the method before is an error", client.infer(names[0], "json").status_code == 500)
        check_log(log, "was made with other settings")
        learnt = len(rows_in(adaptation / "records.jsonl"))
        served = [client.mask(name, reset=name == names[0]) for name in names]
        same = all_equal(served, masks_in(folder / "predicted", names))
        check(f"after a reset {len(names)} masks are those of mgipt predict, pixel by pixel", same)
        rows, run = rows_in(adaptation / "records.jsonl")[learnt:], rows_in(folder / "predicted" / "records.jsonl")
        told = all(one[key] == other[key] for one, other in zip(rows, run, strict=True) for key in TOLD)
        check(f"so are {' and '.join(TOLD)} in the records", told)
        for name in names[10:12]:
            client.save(name, photographs / "masks" / f"{name}.png")
        commissioned_on(studies, folder / "site", names[:12])
        check("which the running server does not notice", client.position(names[0]) == len(names) + 1)
    with server(app, studies, log) as client:
        check("nor a restarted one, which goes on", client.position(names[1]) == len(names) + 2)
        check("adapt false keeps nothing", client.position(names[2], adapt=False) == len(names) + 2)
        check("reset begins anew", client.position(names[0], reset=True) == 1)


def main() -> None:
    """Make app and photographs in a folder that is thrown away, and check."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python("monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", folder)
        app, log = folder / "monaibundle", folder / "server.log"
        write_label_bundle(ROOT / "bundle", app / "model" / NAME)
        write_demo_site(folder, CAMERAS["warm_vignetted"], count=3, seed=0)
        studies = folder / "warm_vignetted" / "images"
        first_server(folder, app, studies, log)
        second_server(folder, app, studies, log)
        write_demo_site(folder, CAMERAS["low_contrast"], count=16, seed=0)
        annotated_server(folder, app, folder / "low_contrast", log)
        commissioned_server(folder, app, folder / "low_contrast", log)
    print("all checks hold")


if __name__ == "__main__":
    main()
