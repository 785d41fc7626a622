"""The command lines whose dry runs are goldens, by name: script and arguments."""

TRAIN = ("--config", "configs/sd15.py")
LASTING = (*TRAIN, "--bucket", "my-bucket", "--workdir", "/mnt/my-bucket/runs/sd15")
SLICE = ("--name", "afa", "--project", "my-project", "--zone", "us-west4-a", "--accelerator-type", "v5litepod-16")
MULTISLICE = (*SLICE, "--slices", "2", "--spot")
GKE = (
    *("--name", "afa", "--image", "us-docker.pkg.dev/my-project/afa/afa:tpu", "--service-account", "trainer"),
    *("--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4"),
    *LASTING,
)
SLURM = ("--nodes", "4", "--gpus-per-node", "8", "--time", "12:00:00", *TRAIN, "--workdir", "runs/sd15")
AWKWARD = (
    """--config.data.path=/data/Bob's "best" pictures/$(touch x)/*""",
    "--config.base=a\\b;c&d",
    "--config.name=two\nlines",
)

EXAMPLES: dict[str, tuple[str, ...]] = {
    "tpu_create": ("tpu.sh", "create", *SLICE),
    "tpu_create_spot": ("tpu.sh", "create", *SLICE, "--spot", "--create-flag=--network=my-net"),
    "tpu_create_queued": ("tpu.sh", "create", *SLICE, "--queued", "--runtime-version", "v2-alpha-tpuv5-lite-next"),
    "tpu_create_multislice": ("tpu.sh", "create", *MULTISLICE),
    "tpu_setup": ("tpu.sh", "setup", *SLICE, *LASTING),
    "tpu_setup_repo": ("tpu.sh", "setup", *SLICE, "--repo", "git@example.org:me/afa.git", "--ref", "v1", "--iap"),
    "tpu_run": ("tpu.sh", "run", *SLICE, *LASTING, "--config.train.batch=64", "--", "--quiet"),
    "tpu_run_awkward": ("tpu.sh", "run", *SLICE, *LASTING, *AWKWARD),
    "tpu_logs": ("tpu.sh", "logs", *MULTISLICE, "--slice", "1", "--worker", "2", "--lines", "20", "--follow"),
    "tpu_status": ("tpu.sh", "status", *SLICE),
    "tpu_resume": ("tpu.sh", "resume", *SLICE, "--spot", *LASTING),
    "tpu_resume_multislice": ("tpu.sh", "resume", *MULTISLICE, *LASTING),
    "tpu_watch": ("tpu.sh", "watch", *SLICE, "--spot", *LASTING, "--delete-when-done"),
    "tpu_ssh": ("tpu.sh", "ssh", *MULTISLICE, "--slice", "1", "--iap"),
    "tpu_stop": ("tpu.sh", "stop", *MULTISLICE),
    "tpu_delete": ("tpu.sh", "delete", *SLICE),
    "tpu_delete_multislice": ("tpu.sh", "delete", *MULTISLICE, "--yes"),
    "gke_apply": ("gke.sh", "apply", *GKE),
    "gke_apply_multislice": ("gke.sh", "apply", *GKE, "--slices", "2", "--spot", "--namespace", "ml", *AWKWARD),
    "gke_status": ("gke.sh", "status", "--name", "afa"),
    "gke_logs": ("gke.sh", "logs", "--name", "afa", "--context", "my-cluster"),
    "gke_delete": ("gke.sh", "delete", "--name", "afa"),
    "slurm": ("slurm.sh", *SLURM),
    "slurm_per_gpu": ("slurm.sh", *SLURM, "--per-gpu", "--partition", "gpu", "--create-flag=--constraint=h100"),
    "slurm_pyxis": ("slurm.sh", *SLURM, "--pyxis", "registry.example.org#afa:cuda13", "--mounts", "/data:/data"),
    "slurm_apptainer": ("slurm.sh", *SLURM, "--apptainer", "afa.sif", "--mounts", "/data:/data", *AWKWARD),
}
