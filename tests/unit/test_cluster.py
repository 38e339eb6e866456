"""Runs on a Ray cluster: the same records, lost workers, and errors in a sentence."""

import hashlib
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import ddlib as dd
from ddlib import cli
from ddlib.core import DDError
from ddlib.engine import cluster, queue
from ddlib.engine.checkpoint import Progress
from ddlib.engine.cluster import Code, Order, Outcome, perform

SHORT = {"networks": 1, "eval_epochs": 2, "evaluations": 1, "snapshots": 0}
EXPERTS = {"experts": 2, "expert_total": 3, "max_start": 1, "expert_epochs": 1, "syn_steps": 2}
HOST = {"seconds", "peak_bytes", "device", "written", "seal"}  # differ from machine to machine


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    """Where workers keep what is theirs."""
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "cache" / "ray" / "runs" / "smoke"
    signal.signal(signal.SIGTERM, before)  # Ray keeps it, also where it found no cluster


def order(**changes) -> Order:
    spec = dd.resolve("dm", "digits", 1, "smoke", iterations=120, **SHORT)
    return Order(spec, "cpu", 1, Code.here(), **changes)


def kept(folder: Path) -> dict[str, object]:
    """Every record below a folder without what differs from machine to machine, and every set's checksum."""
    found = {}
    for path in sorted(folder.glob("smoke/*/[!.]*.*")):
        if path.suffix == ".json":
            record = json.loads(path.read_text())
            record["extra"].pop("expert seconds", None)
            found[path.name] = {k: v for k, v in record.items() if k not in HOST}
        else:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def worker_of(process: Path) -> bool:
    try:
        return process.joinpath("cmdline").read_bytes().startswith(b"ray::")
    except OSError:
        return False


def kill_a_worker(room: Path, name: str) -> None:
    """Kill the worker that has written a checkpoint of the run `name`: the one that holds its lock open."""
    while not (room / "checkpoints" / f"{name}.safetensors").is_file():
        time.sleep(0.01)
    held = os.path.realpath(room / "dm" / ".locks" / f"{name}.json.lock")
    for process in filter(worker_of, Path("/proc").glob("[0-9]*")):
        if held in {os.path.realpath(file) for file in (process / "fd").glob("*")}:
            os.kill(int(process.name), signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the worker in /proc")
def test_a_cluster_makes_the_same_records_though_a_worker_is_lost(tmp_path, room, monkeypatch):
    utils = pytest.importorskip("ray.cluster_utils")
    rows = [("dm", 0, {"iterations": 400}), ("dm", 1, {"iterations": 30}), ("mtt", 0, EXPERTS)]
    specs = [dd.resolve(m, "digits", 1, "smoke", seed, **SHORT, **kw) for m, seed, kw in rows]
    for (method, seed, changes), spec in zip(rows, specs, strict=True):
        monkeypatch.setenv("DDLIB_EXPERTS", str(tmp_path / "experts"))
        options = {"teach": method == "mtt", "progress": False, "results": tmp_path / "local"}
        run = dd.run(method, "digits", ipc=1, seed=seed, **options, **SHORT, **changes)
        assert run.path.stem == spec.name
    monkeypatch.setenv("DDLIB_EXPERTS", str(tmp_path / "others"))
    begun = tmp_path / "begun"

    def noted(order: Order, *experts: Outcome) -> Outcome:
        with begun.open("a") as file:
            file.write(f"{order.spec.name} {order.expert}\n")
        return perform(order, *experts)

    monkeypatch.setattr(cluster, "perform", noted)
    killer = threading.Thread(target=kill_a_worker, args=(room, specs[0].name), daemon=True)
    killer.start()
    nodes = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes.add_node(num_cpus=1)
        address = f"127.0.0.1:{nodes.address.rpartition(':')[2]}"  # no test leaves the loopback
        folder = tmp_path / "ray"
        planned = queue.unpriced(specs, folder)
        assert cluster.work_through(planned, address, device="cpu", results=folder)
        counts = [begun.read_text().splitlines().count(f"{spec.name} None") for spec in specs]
        assert not killer.is_alive() and counts == [2, 1, 1]
        assert kept(folder) == kept(tmp_path / "local")
        assert begun.read_text().count(specs[2].name) == 1 + EXPERTS["experts"]
        before = begun.read_text()
        assert cluster.work_through(planned, address, device="cpu", results=folder)
        assert begun.read_text() == before  # all kept: nothing is computed twice
        options = {"engine": "ray", "address": address, "device": "cpu", "results": folder}
        table = dd.sweep("dm", "digits", ipcs=[1], iterations=400, **SHORT, **options)
        assert table.name.tolist() == [specs[0].name] and begun.read_text() == before
    finally:
        nodes.shutdown()


def test_a_stopped_order_goes_on_elsewhere_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    before = os.environ.get("DDLIB_EXPERTS")
    whole = perform(order())
    assert whole.word == "done" and len(whole.files) == 2
    assert os.environ.get("DDLIB_EXPERTS") == before  # a caller's own experts stay where they are
    name = order().spec.name
    step = Progress.save

    def stop_after(progress):
        step(progress)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "save", stop_after)
    stopped = perform(order())
    monkeypatch.undo()
    assert stopped.word == "stopped" and list(stopped.files) == [
        f"smoke/checkpoints/{name}.safetensors"
    ]
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "elsewhere"))
    steps, step_once = [], dd.METHODS["dm"].step
    monkeypatch.setattr(dd.METHODS["dm"], "step", lambda dm: steps.append(dm) or step_once(dm))
    rest = perform(order(checkpoint=stopped.files[f"smoke/checkpoints/{name}.safetensors"]))
    made = f"smoke/dm/{name}.safetensors"
    assert rest.word == "done" and 0 < len(steps) < order().spec.config.iterations
    assert rest.files[made] == whole.files[made]


def test_errors_of_a_worker_are_sentences(monkeypatch, tmp_path):
    other = replace(order(), code=Code("9.9", None))
    assert "has ddlib" in perform(other).why and perform(other).word == "failed"
    assert not Code("1", "a").same(Code("1", "b")) and Code("1", None).same(Code("1", "b"))
    assert perform(order(end=0.0)).word == "later"
    lost = Outcome("failed", "no room")
    assert perform(order(), Outcome("done"), lost) == lost
    monkeypatch.setenv("DDLIB_DATA", str(tmp_path / "nothing"))
    spec = dd.resolve("dm", "mnist", 1, "smoke", **SHORT)
    outcome = perform(replace(order(), spec=spec))
    assert outcome.word == "failed" and "MNIST" in outcome.why and "(on " in outcome.why


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: Connection refused"),
        ("here", "the address of a Ray cluster is HOST:PORT or auto, not 'here'"),
        ("localhost:0", "is HOST:PORT or auto"),
        ("auto", "no Ray cluster on this machine"),
    ],
)
def test_an_address_that_does_not_answer_is_named(address, message):
    pytest.importorskip("ray")
    with pytest.raises(DDError, match=message):
        cluster.work_through([], address)


def test_without_ray_a_sentence_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DDError, match="pip install 'ddlib\\[ray\\]'"):
        dd.sweep("dm", "digits", ipcs=[1], engine="ray", results=tmp_path)
    with pytest.raises(DDError, match="unknown engine 'dask'; allowed: local, ray"):
        dd.sweep("dm", "digits", ipcs=[1], engine="dask")
    with pytest.raises(DDError, match="minutes must be above 0, not 0"):
        cluster.work_through([], minutes=0)
    path = tmp_path / "rows.yaml"
    path.write_text("[]")
    monkeypatch.setattr("sys.argv", ["ddlib", "queue", str(path), "--engine", "ray"])
    assert cli.main() == 2 and "needs Ray" in capsys.readouterr().err
