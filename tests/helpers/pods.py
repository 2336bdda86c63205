"""A pod's life, replayed: what a kubelet and the controller of Jobs do with a manifest, on this
machine. The container is real processes with a PID 1, a hostname, mounts and a user of their own;
the image is this environment. What is decided, the manifest's own rules decide.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.helpers import launchers
from tests.helpers.ranks import ROOT

USER = 1000
AS_USER: tuple[str, ...] = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
AS_USER += ("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
APART = ("unshare", "-m", "-u", "-p", "-f", "--mount-proc", "--propagation=private")
KILLED = 137


def obstacle() -> str | None:
    """Why no pod can be replayed on this machine; None: nothing is in the way."""
    programs = ("tini", "unshare", "nsenter", "setpriv", "hostname", "mount")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "not root: a container is namespaces"
    done = subprocess.run([*APART, "true"], capture_output=True, text=True)
    return None if done.returncode == 0 else f"no namespaces: {done.stderr.strip()}"


def verdict(rules: Sequence[Mapping[str, Any]], code: int | None, disrupted: bool) -> str:
    """What the first rule that fits says of a pod that has failed; `Count`: none fits.

    Args:
        code: of its container; None: with its node, nobody heard of it.
        disrupted: whether the control plane has ended the pod.
    """
    for rule in rules:
        exit_codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", ())
        if exit_codes is not None and code is not None:
            inside = code in exit_codes["values"]
            if inside == (exit_codes["operator"] == "In"):
                return str(rule["action"])
        if disrupted and any(c["type"] == "DisruptionTarget" for c in conditions):
            return str(rule["action"])
    return "Count"


def expand(value: str, known: Mapping[str, str]) -> str:
    """`$(NAME)`, as Kubernetes fills it in: from what stands above it."""
    return re.sub(r"\$\((\w+)\)", lambda m: known.get(m[1], m[0]), value)


@dataclass
class Pod:
    """One pod of a Job."""

    index: int
    process: subprocess.Popen[bytes]
    log: Path
    disrupted: bool = False
    lost: bool = False
    killed: bool = False

    def wait_until(self, text: str) -> None:
        launchers.wait_until(self.log, text, self.process)

    def init(self) -> psutil.Process:
        """PID 1 of the container."""
        (one,) = psutil.Process(self.process.pid).children()
        return one

    def ranks(self) -> list[psutil.Process]:
        found = []
        for process in self.init().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # helpers of the script come and go
                if "-m keepstep.train" in " ".join(process.cmdline()[:4]):
                    found.append(process)
        return found

    def kill_all(self) -> None:
        """But PID 1: as the kernel does for lack of memory, where the kubelet has it so."""
        for process in self.init().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """A command in the container, as the kubelet runs a probe."""
        init = self.init()
        told = [f"{name}={value}" for name, value in init.environ().items()]
        enter = ["nsenter", "-t", str(init.pid), "-m", "-u", "-p", "env", "-i", *told, *AS_USER]
        return subprocess.run(
            [*enter, *command], capture_output=True, text=True, timeout=launchers.TIMEOUT
        )

    def ended(self, timeout: float = launchers.TIMEOUT) -> int | None:
        """The container's exit status; None: it went with its node."""
        code = self.process.wait(timeout)
        return None if self.lost else KILLED if self.killed else code

    def evict(self, grace: float) -> int | None:
        """TERM to PID 1, and KILL when the grace is over."""
        self.disrupted = True
        init = self.init()
        init.send_signal(signal.SIGTERM)
        try:
            return self.ended(grace)
        except subprocess.TimeoutExpired:
            self.killed = True  # unshare fails to end by the same signal
            init.kill()
            return self.ended()

    def lose_node(self) -> None:
        """The power is gone. The control plane gives the pod up later."""
        self.disrupted = self.lost = True
        self.init().kill()
        self.process.wait(launchers.TIMEOUT)


@dataclass
class Job:
    """A Job of a manifest, with the pods that it has made.

    Attributes:
        spec: the Job's.
        folder: for the volumes and logs; every user may enter it.
        values: environment variables in the place of the manifest's: a laptop has no 8 GPUs.
        names: pods' names of the network, all at this machine.
        commands: the folder of the image's commands.
    """

    spec: dict[str, Any]
    folder: Path
    values: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    commands: Path = Path(sys.executable).parent
    failed: int = 0
    made: int = 0
    failed_for: str | None = None

    @property
    def grace(self) -> float:
        return float(self.spec["template"]["spec"]["terminationGracePeriodSeconds"])

    def start(self, index: int = 0) -> Pod:
        """A new pod, as the manifest has it."""
        pod = self.spec["template"]["spec"]
        (container,) = pod["containers"]
        self.made += 1
        log = self.folder / f"pod-{self.made}.log"
        mounts = {m["mountPath"]: str(self._volume(m["name"])) for m in container["volumeMounts"]}
        environment = {
            "PATH": f"{self.commands}:/usr/bin:/bin:/usr/sbin:/sbin",
            "TMPDIR": mounts["/tmp"],
            **{n: os.environ[n] for n in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")},
        }
        for one in container["env"]:
            source = one.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            value = str(index) if "completion-index" in source else one.get("value", "")
            if value or one["name"] in self.values:
                text = self.values.get(one["name"], value)
                environment[one["name"]] = _mounted(expand(text, environment), mounts)
        environment |= {k: v for k, v in self.values.items() if k not in environment}
        dockerfile = (ROOT / "kubernetes/Dockerfile").read_text()
        entry = re.search(r"^ENTRYPOINT (.+)$", dockerfile, re.M)
        assert entry
        command = [*json.loads(entry[1]), *(_mounted(word, mounts) for word in container["args"])]
        apart = [*APART, "bash", "-c", self._script(index, environment, command)]
        process = launchers.start(apart, log)
        return Pod(index, process, log)

    def probe(self) -> list[str]:
        """The liveness probe's command, for this machine's paths."""
        (container,) = self.spec["template"]["spec"]["containers"]
        mounts = {m["mountPath"]: str(self._volume(m["name"])) for m in container["volumeMounts"]}
        return [_mounted(w, mounts) for w in container["livenessProbe"]["exec"]["command"]]

    def judge(self, pod: Pod, code: int | None) -> str:
        """What becomes of the Job now that a pod has ended: `Complete`, `Failed`, or `Again`."""
        if code == 0:
            return "Complete"
        action = verdict(self.spec["podFailurePolicy"]["rules"], code, pod.disrupted)
        self.failed += action == "Count"
        if action == "FailJob" or self.failed > self.spec["backoffLimit"]:
            return "Failed"
        return "Again"

    def _volume(self, name: str) -> Path:
        volumes = {v["name"]: v for v in self.spec["template"]["spec"]["volumes"]}
        lasts = "emptyDir" not in volumes[name]
        return self._own(name if lasts else f"{name}-{self.made}")

    def _is_read_only(self) -> bool:
        (container,) = self.spec["template"]["spec"]["containers"]
        return bool(container["securityContext"]["readOnlyRootFilesystem"])

    def _own(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            path.mkdir()
            os.chown(path, USER, USER)  # fsGroup
        return path

    def _script(self, index: int, environment: Mapping[str, str], command: list[str]) -> str:
        hosts = self.folder / "hosts"
        names = ("localhost", "keepstep-0", "keepstep-1", *self.names)
        hosts.write_text("".join(f"127.0.0.1 {name}\n" for name in names))
        told = [f"{name}={value}" for name, value in environment.items()]
        return "\n".join(
            [
                "set -e",
                f"hostname keepstep-{index}",
                f"mount --bind {shlex.quote(str(hosts))} /etc/hosts",
                "mount -t tmpfs -o size=1g tmpfs /dev/shm",
                *_opened([ROOT, Path(sys.base_prefix).resolve()], self.folder),
                *(_read_only_but(self.folder) if self._is_read_only() else ()),
                "cd /",
                shlex.join(["exec", "env", "-i", *told, *AS_USER, *command]),
            ]
        )


def _mounted(text: str, mounts: Mapping[str, str]) -> str:
    """A path in the container, as this machine has it."""
    for inside, outside in mounts.items():
        if text == inside or text.startswith(f"{inside}/"):
            return outside + text[len(inside) :]
    return text


def _read_only_but(folder: Path) -> list[str]:
    """Commands after which the namespace's root file system is read-only, that folder is not."""
    own = shlex.quote(str(folder))
    return [f"mount --bind {own} {own}", "mount -o remount,bind,ro /"]


def _opened(paths: Sequence[Path], aside: Path) -> list[str]:
    """Commands after which every user of the namespace can enter these, wherever they lie."""
    first, then, tops = [], [], []
    for number, path in enumerate(paths):
        closed = [p for p in reversed(path.parents) if not p.stat().st_mode & 0o001]
        if not closed:
            continue
        kept = aside / f"opened-{number}"
        kept.mkdir(exist_ok=True)
        first.append(shlex.join(["mount", "--bind", str(path), str(kept)]))
        then += [f"mkdir -p {path}", shlex.join(["mount", "--bind", str(kept), str(path)])]
        tops += [closed[0]] if closed[0] not in tops else []
    return [*first, *(f"mount -t tmpfs -o mode=755 tmpfs {top}" for top in tops), *then]


def image(folder: Path) -> Path:
    """An environment of what the Dockerfile copies, installed as it says (but for the libraries,
    which are those of this environment); the folder of its commands."""
    context, made = folder / "context", folder / "image"
    context.mkdir()
    dockerfile = (ROOT / "kubernetes/Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile, re.M):
        for name in line.split():
            source = ROOT / name
            put = shutil.copytree if source.is_dir() else shutil.copy
            put(source, context / name)
    venv.create(made, with_pip=True)
    (site,) = made.glob("lib/python3*/site-packages")
    libraries = [p for p in sys.path if p.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    python = made / "bin/python"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([python, *pip, context], check=True)
    launcher = made / "bin/accelerate-launch"  # pip would make it with torch's own install
    program = "from accelerate.commands.launch import main\nmain()\n"
    launcher.write_text(f"#!{python}\n{program}")
    launcher.chmod(0o755)
    (made / "bin/ninja").symlink_to(Path(sys.executable).with_name("ninja"))
    for path in (made, *made.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o044 | (0o011 if path.is_dir() else 0))
    return made / "bin"


def copied(source: str | Path, folder: Path) -> Path:
    """A folder as the pods' user has it: its own. (A lock in it is of a run beside this one.)"""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("lock"))
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)
    return folder
