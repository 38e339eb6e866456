"""Runs on a Ray cluster: the same records, lost workers, and errors in a sentence."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ddlib as dd
from ddlib import cli
from ddlib.core import DDError
from ddlib.engine import checkpoint, cluster, queue
from ddlib.engine.checkpoint import Progress
from ddlib.engine.cluster import Code, Order, Outcome, perform
from ddlib.files import CannotWrite

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
    small = SHORT | {"backbone": "convnet:width=8"}
    # Each task is a process that imports torch: the run that is killed, an expert, and the run that needs it.
    rows = {"dm": {"iterations": 400}, "mtt": EXPERTS | {"experts": 1, "iterations": 3}}
    specs = [dd.resolve(m, "digits", 1, "smoke", **small, **kw) for m, kw in rows.items()]
    monkeypatch.setenv("DDLIB_EXPERTS", str(tmp_path / "experts"))
    for (method, changes), spec in zip(rows.items(), specs, strict=True):
        options = {"teach": method == "mtt", "progress": False, "results": tmp_path / "local"}
        run = dd.run(method, "digits", ipc=1, **options, **small, **changes)
        assert run.path.stem == spec.name
    monkeypatch.setenv("DDLIB_EXPERTS", str(tmp_path / "others"))
    begun = tmp_path / "begun"

    def noted(order: Order, *experts: Outcome) -> Outcome:
        with begun.open("a") as file:
            file.write(f"{order.spec.name} {order.expert} by {os.getpid()}\n")
        return perform(order, *experts)

    monkeypatch.setattr(cluster, "perform", noted)
    killer = threading.Thread(target=kill_a_worker, args=(room, specs[0].name), daemon=True)
    killer.start()
    # Neither pages nor what adds nodes or gathers logs: each is a process that imports for seconds.
    bare = {"num_cpus": 1, "include_dashboard": False, "include_log_monitor": False}
    nodes = utils.Cluster()
    try:
        nodes.add_node(wait=False, no_monitor=True, **bare)
        nodes.add_node(wait=False, **bare)
        nodes.wait_for_nodes(timeout=180)  # on a busy machine longer than what Ray waits by itself
        address = f"127.0.0.1:{nodes.address.rpartition(':')[2]}"  # no test leaves the loopback
        folder = tmp_path / "ray"
        planned = queue.unpriced(specs, folder)
        with cluster.connected(address) as ray:
            address = ray.get_runtime_context().gcs_address
            assert cluster.work_through(planned, address, device="cpu", results=folder)
            before = begun.read_text()
            assert cluster.work_through(planned, address, device="cpu", results=folder)
            options = {"engine": "ray", "address": address, "device": "cpu", "results": folder}
            table = dd.sweep("mtt", "digits", ipcs=[1], **small, **rows["mtt"], **options)
        assert table.name.tolist() == [specs[1].name]
        assert begun.read_text() == before  # all kept: nothing is computed twice
        counts = [begun.read_text().count(f"{spec.name} None") for spec in specs]
        assert not killer.is_alive() and counts == [2, 1]
        assert kept(folder) == kept(tmp_path / "local")
        assert begun.read_text().count(specs[1].name) == 1 + 1  # the run and its expert
        processes = [line.split()[-1] for line in begun.read_text().splitlines()]
        assert len(set(processes)) == len(processes)  # no run is put where another or an expert was
        assert len(list((tmp_path / "others").glob("*/expert-*.safetensors"))) == 1
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
    monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / "another"))
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


class Ray:
    """Ray in this process: a task is carried out when its outcome is asked for; `stuck` tasks find no place."""

    exceptions = SimpleNamespace(
        RayTaskError=KeyError, RayError=KeyError, RuntimeEnvSetupError=KeyError
    )

    def __init__(self, *nodes: dict[str, float], stuck: bool = False):
        self.resources, self.stuck = nodes or ({"CPU": 2.0},), stuck
        self.orders: list[Order] = []
        self.options: list[dict] = []  # of each order
        self.tasks, self.cancelled = [], []

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": node} for node in self.resources]

    def remote(self, **options):
        return lambda function: SimpleNamespace(
            remote=lambda *args: self._task(function, args, options)
        )

    def _task(self, function, args, options) -> int:
        def outcome() -> Outcome:
            return function(args[0], *map(self.get, args[1:]))

        self.orders.append(args[0])
        self.options.append(options)
        return self.put(outcome)

    def put(self, value) -> int:
        self.tasks.append(value)
        return len(self.tasks) - 1

    def wait(self, refs, timeout):
        return ([], refs) if self.stuck else (refs[:1], refs[1:])

    def get(self, ref: int) -> Outcome:
        if callable(self.tasks[ref]):
            self.tasks[ref] = self.tasks[ref]()
        return self.tasks[ref]

    def cancel(self, ref: int) -> None:
        self.cancelled.append(ref)


@pytest.fixture
def work_through(monkeypatch, tmp_path):
    """`cluster.work_through` of specs on a `Ray`, with the records in tmp_path."""

    def call(ray: Ray, *specs, **options) -> bool:
        monkeypatch.setattr(cluster, "connected", lambda address: nullcontext(ray))
        return cluster.work_through(queue.unpriced(specs, tmp_path), device="cpu", **options)

    return call


def short(seed: int = 0):
    return dd.resolve("dm", "digits", 1, "smoke", seed, iterations=3, **SHORT)


def test_a_full_disk_here_costs_no_run(work_through, monkeypatch, capsys, tmp_path):
    for module in (cluster, checkpoint):
        monkeypatch.setattr(module, "commit", lambda: "c" * 40)
    write = cluster.write_atomically

    def full(path, content):
        if short().name in path.name:
            raise CannotWrite(f"cannot write {path}: no space")
        return write(path, content)

    monkeypatch.setattr(cluster, "write_atomically", full)
    assert not work_through(Ray(), short(), short(1))
    said = capsys.readouterr().out
    assert "failed   dm digits IPC 1 seed 0" in said and "no space" in said
    assert "done     dm digits IPC 1 seed 1" in said
    monkeypatch.setattr(cluster, "write_atomically", write)
    monkeypatch.setattr(dd.METHODS["dm"], "step", None)  # the node has the run still
    assert work_through(Ray(), short(), short(1))
    assert len(list(tmp_path.glob("smoke/dm/*.json"))) == 2


def test_what_a_node_keeps_is_removed_in_time_or_where_the_code_is_another(room, monkeypatch):
    steps, step_once = [], dd.METHODS["dm"].step
    monkeypatch.setattr(dd.METHODS["dm"], "step", lambda dm: steps.append(dm) or step_once(dm))
    for code, expected in (("a", 3), ("a", 3), ("b", 6), ("b-dirty", 9), ("b-dirty", 12)):
        for module in (cluster, checkpoint):
            monkeypatch.setattr(module, "commit", lambda code=code: code)
        assert perform(Order(short(), "cpu", 1, Code.here())).word == "done"
        assert len(steps) == expected
    (record,) = room.glob("dm/*.json")
    os.utime(record, (0, 0))
    perform(Order(short(1), "cpu", 1, Code.here()))
    assert not record.exists() and not record.with_suffix(".safetensors").exists()


def test_a_row_whose_images_are_not_here_fails_alone(work_through, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DDLIB_DATA", str(tmp_path / "nothing"))
    absent = dd.resolve("mtt", "mnist", 1, "smoke", **EXPERTS)
    assert not work_through(Ray(), absent, short())
    said = capsys.readouterr().out
    assert "failed   mtt mnist" in said and "done     dm digits" in said


@pytest.mark.parametrize("device, calls", [("cpu", [16, 16, 1]), ("cuda", [1, 1, 1])])
def test_experts_share_processes_that_no_run_is_put_on(device, calls, monkeypatch, tmp_path):
    monkeypatch.setenv("DDLIB_EXPERTS", str(tmp_path))
    monkeypatch.setattr(cluster, "perform", lambda order, *experts: Outcome("later"))
    ray = Ray({"CPU": 2, "GPU": 1})
    monkeypatch.setattr(cluster, "connected", lambda address: nullcontext(ray))
    spec = dd.resolve("mtt", "digits", 1, "smoke", **EXPERTS)
    assert cluster.work_through(queue.unpriced([spec], tmp_path), device=device)
    assert [order.expert for order in ray.orders] == [0, 1, None]
    assert [options["max_calls"] for options in ray.options] == calls
    assert ["runtime_env" in options for options in ray.options] == [True, True, False]


def test_an_asset_that_says_no_files_is_made_by_its_run(work_through, monkeypatch, tmp_path):
    made = []
    asset = SimpleNamespace(make=lambda data, backbone, **options: made.append(options) or [])
    monkeypatch.setattr(dd.METHODS["dm"], "needs", classmethod(lambda cls, config: [asset]))
    ray = Ray()
    assert work_through(ray, short()) and len(ray.orders) == 1
    assert made == [{"compile": False, "progress": False}]
    assert list(tmp_path.glob("smoke/dm/*.json"))


def test_a_done_run_without_its_files_has_failed(work_through, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "perform", lambda order: Outcome("done"))
    assert not work_through(Ray(), short()) and "did not come back" in capsys.readouterr().out


def test_a_failed_run_goes_on_from_the_checkpoint_that_is_further_on(tmp_path, monkeypatch):
    step_once, name = dd.METHODS["dm"].step, f"smoke/checkpoints/{order().spec.name}.safetensors"

    def perform_at(node: str, last: int, sent: bytes | None = None) -> tuple[Outcome, int]:
        """What came of an order on a node that fails after so many steps, and how many were made."""
        steps = []

        def step(dm):
            if len(steps) == last:
                raise DDError("no more")
            steps.append(dm)
            return step_once(dm)

        monkeypatch.setattr(dd.METHODS["dm"], "step", step)
        monkeypatch.setenv("DDLIB_CACHE", str(tmp_path / node))
        return perform(order(checkpoint=sent)), len(steps)

    early, late = perform_at("a", 30)[0], perform_at("b", 90)[0]
    assert early.word == late.word == "failed" and "no more" in early.why
    assert perform_at("b", 200, sent=early.files[name])[1] == 30
    done, count = perform_at("a", 200, sent=late.files[name])
    assert done.word == "done" and count == 30


def test_a_run_that_finds_no_place_is_for_later(work_through, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "GRACE", 0)
    ray = Ray(stuck=True)
    assert work_through(ray, short(), minutes=1e-3)
    assert "later    dm digits" in capsys.readouterr().out and ray.cancelled == [0]


@pytest.mark.parametrize(
    ("device", "threads", "nodes", "means"),
    [
        ("auto", 1, [{"CPU": 2}], "cpu"),
        ("auto", 1, [{}, {"CPU": 2, "GPU": 1}], "cuda"),
        ("cpu", 4, [{"CPU": 4, "GPU": 1}], "cpu"),
        ("cuda", 1, [{"CPU": 2}], "no node of the Ray cluster has a GPU"),
        ("cpu", 64, [{"CPU": 2}, {"CPU": 8}], "threads must be at most 8"),
        (
            "auto",
            4,
            [{"CPU": 8}, {"CPU": 2, "GPU": 1}],
            "at most 2, the cores of the largest node with",
        ),
        ("cuda:1", 1, [{"CPU": 2, "GPU": 2}], "unknown device .* allowed: auto, cpu, cuda"),
    ],
)
def test_what_no_node_has_is_refused(device, threads, nodes, means, monkeypatch, tmp_path):
    ray = Ray(*nodes)
    monkeypatch.setattr(cluster, "connected", lambda address: nullcontext(ray))
    monkeypatch.setattr(cluster, "perform", lambda order: Outcome("later"))
    rows, options = queue.unpriced([short()], tmp_path), {"device": device, "threads": threads}
    if means in cluster.PLACES:
        assert cluster.work_through(rows, **options)
        assert ray.orders[0].device == means
        assert ray.options[-1]["num_gpus"] == (1 if means == "cuda" else 0)
    else:
        with pytest.raises(DDError, match=means):
            cluster.work_through(rows, **options)


def test_experts_come_back_and_are_trained_once(work_through, monkeypatch, tmp_path):
    monkeypatch.setenv("DDLIB_EXPERTS", str(tmp_path / "experts"))
    first, again = Ray(), Ray()
    assert work_through(first, dd.resolve("mtt", "digits", 1, "smoke", **SHORT, **EXPERTS))
    assert [order.expert for order in first.orders] == [0, 1, None]
    assert len(list(tmp_path.glob("experts/*/expert-*.json"))) == EXPERTS["experts"]
    assert work_through(again, dd.resolve("mtt", "digits", 1, "smoke", 1, **SHORT, **EXPERTS))
    assert [order.expert for order in again.orders] == [None]


def test_a_sweep_says_what_failed_on_the_cluster(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "work_through", lambda *rest: False)
    monkeypatch.setenv("DDLIB_RESULTS", str(tmp_path))
    with pytest.raises(DDError, match="2 of 2 runs failed on the cluster"):
        dd.sweep("dm", "digits", ipcs=[1], seeds=[0, 1], engine="ray")
    options = ("together", True), ("fresh", True), ("any_threads", True), ("checkpoint_every", 7)
    for option in [{key: value} for key, value in options]:
        with pytest.raises(DDError, match=f"{next(iter(option))} does not go with engine='ray'"):
            dd.sweep("dm", "digits", ipcs=[1], engine="ray", **option)


def test_a_notebooks_own_ray_is_used_and_another_version_is_a_sentence(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Version mismatch: the cluster has\n  Ray: 1.0")

    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    ray = SimpleNamespace(
        is_initialized=lambda: True, get_runtime_context=lambda: context, init=refuse
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    with cluster.connected("10.0.0.1:6379") as present:
        assert present is ray
    with pytest.raises(DDError, match="is on the Ray cluster at 10.0.0.1:6379, not 10.0.0.2:6379"):
        cluster.work_through([], "10.0.0.2:6379")
    ray.is_initialized = lambda: False
    with pytest.raises(DDError, match="no Ray cluster on this machine: Version .* has Ray: 1.0"):
        cluster.work_through([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_head_without_a_gpu_plans_for_nodes_that_have_one(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text("[]")
    words = ["ddlib", "queue", str(path), "--device", "cuda", "--plan"]
    monkeypatch.setattr("sys.argv", words)
    assert cli.main() == 2 and "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*words, "--engine", "ray"])
    assert cli.main() == 0


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
    monkeypatch.setitem(sys.modules, "ray", None)
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
