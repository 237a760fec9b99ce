"""Scripts out of the templates of slurm/: `render_script("train", job, cluster)`.

Every word that comes from outside goes through one of three: `quoted` in bash, `directive` in an #SBATCH line,
`one_line` in a comment.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2

from megacl.config_cluster import ClusterConfig, ContainerConfig
from megacl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a script is about, beside the cluster."""

    kind: str
    """The template: train, prepare, ..."""
    name: str
    """What squeue shows."""
    run_dir: Path
    """The folder whose jobs/ and logs/ the job has; absolute, as all paths here."""
    number: int
    """Of its folder, run_dir/jobs/NUMBER."""
    workdir: Path
    """Where paths in the configuration count from."""
    python: str
    command: tuple[str, ...]
    """The words after `python -m megacl`."""
    alone: bool = False
    """One process on one node, whatever the cluster's nodes and tasks."""
    gpus: bool = True
    """Whether it computes on GPUs where nodes have them."""
    array: str | None = None
    """Of an array: the numbers of its tasks, as SLURM writes them: 1-8, 3,5, 1-8%2 for two at a time."""
    tasks: int = 1
    """Of a prepare: how many tasks there are in all."""
    runs: tuple[str, ...] = ()
    """Of an array that trains a study's runs: their names, the first one task 1's."""

    @property
    def folder(self) -> Path:
        """What is frozen, the script, job.json."""
        return job_folder(self.run_dir, self.number)

    @property
    def script(self) -> Path:
        return self.folder / f"{self.kind}.sbatch"

    @property
    def log(self) -> str:
        """Where its output goes, as SLURM reads it: %j stands for the job's id, %% for a percent sign.

        A task of an array has a log of its own, %A_%a.log.

        Raises ConfigError where the path has a backslash, behind which SLURM reads no codes.
        """
        if "\\" in str(self.run_dir):
            raise ConfigError(
                f"{self.run_dir}: SLURM cannot write logs where a name has a backslash; name it differently."
            )
        return f"{str(self.run_dir).replace('%', '%%')}/logs/{'%A_%a' if self.array else '%j'}.log"

    def log_of(self, job_id: str) -> Path:
        """Where the output of the job of an id lies; of an array, %a stands for the task's number."""
        return self.run_dir / "logs" / f"{job_id}{'_%a' if self.array else ''}.log"


def job_folder(run_dir: Path, number: int) -> Path:
    """The folder of a run's job by its number."""
    return run_dir / "jobs" / f"{number:04d}"


def render_script(job: Job, cluster: ClusterConfig) -> str:
    """The script of a job. Raises ConfigError where a value cannot stand in an #SBATCH line, or in a script at all."""
    if ":" in str(job.run_dir):  # which parts the folders of PYTHONPATH, where the frozen code is to be found
        raise ConfigError(f"{job.run_dir}: a job cannot run code from where a name has a colon; name it differently.")
    template = _environment().get_template(f"{job.kind}.sbatch.j2")
    script = template.render(job=job, cluster=cluster, **_asked(job, cluster))
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in script):
        raise ConfigError(f"the script of {job.name!r} would hold bytes that are no text; name files differently.")
    return script


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"quoted": quoted, "one_line": one_line}
    environment.globals["directive"] = directive
    return environment


def _asked(job: Job, cluster: ClusterConfig) -> dict[str, object]:
    """What follows from a cluster file for the templates: GPUs and CPUs to ask for, words that lead into a container.

    gpus: of --gpus-per-node, "" for none. cpus: of a task, None where nothing is said. container: srun's options
    (pyxis), or the words before a command, and none where there is no container. srun_options: where ranks are bound.
    """
    gpus, cpus = "", cluster.cpus_per_task
    if cluster.gpus_per_node and job.gpus:
        gpus = str(1 if job.alone else cluster.gpus_per_node)
        gpus = f"{cluster.gpu_type}:{gpus}" if cluster.gpu_type else gpus
    if cpus is not None and cluster.launcher == "torchrun" and not job.alone:
        cpus *= cluster.ranks_per_node
    options = [f"--cpu-bind={cluster.cpu_bind}"] if cluster.cpu_bind else []
    options += ["--mem-bind=local"] if cluster.numa_local else []
    return {
        "gpus": gpus,
        "cpus": cpus,
        "container": _container_words(job, cluster.container, gpus=bool(gpus)),
        "pyxis": cluster.container is not None and cluster.container.runtime == "pyxis",
        "srun_options": options,
    }


def _container_words(job: Job, container: ContainerConfig | None, *, gpus: bool) -> list[str]:
    """What leads a command into the container; the job's own folders are mounted where they are."""
    if container is None:
        return []
    inside = job.run_dir.is_relative_to(job.workdir)
    mounts = [f"{folder}:{folder}" for folder in (job.workdir, *(() if inside else (job.run_dir,)))]
    mounts += container.mounts
    for mount in mounts:
        if "," in mount or mount.count(":") > 2:
            raise ConfigError(f"{mount}: a container's mounts cannot hold commas, nor their names colons; move it.")
    if container.runtime == "pyxis":
        # Without --container-workdir a process begins in the image's own, whatever srun's is.
        mounted = f"--container-mounts={','.join(mounts)}"
        return [f"--container-image={container.image}", mounted, f"--container-workdir={job.workdir}"]
    gpu = ["--nv"] if gpus else []
    return ["apptainer", "exec", *gpu, *(f"--bind={mount}" for mount in mounts), container.image]


def templates() -> Path:
    """The folder of the templates: beside this module in an installed package, in slurm/ of a checkout."""
    package = Path(__file__).parent
    return package if (package / "train.sbatch.j2").is_file() else package.parents[1] / "slurm"


def quoted(word: object) -> str:
    """A word for bash, whatever it holds."""
    text = str(word)
    return text if re.fullmatch(r"[A-Za-z0-9_./:@%+=-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def one_line(text: object) -> str:
    """A text for a comment."""
    return " ".join(str(text).split())


def directive(option: str, value: object = "") -> str:
    """An #SBATCH line. Raises ConfigError where the value holds a line break, which none can."""
    text = str(value)
    if len(f"{text}.".splitlines()) > 1:
        raise ConfigError(
            f"{option} would be {text!r}; an option of SLURM cannot hold line breaks, so name it differently."
        )
    if not text:
        return f"#SBATCH {option}"
    if re.fullmatch(r"[\w./:@%+,=\[\]-]+", text):
        return f"#SBATCH {option}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH {option}="{escaped}"'
