"""Make the folders data/, figures/ and results/, and fetch datasets:

python init_directory.py
python init_directory.py --download MNIST FashionMNIST CIFAR10

Downloads come from the published mirrors, are verified by checksum, continue where they stopped, and leave nothing
half-written. The scripts' default, mnist-mini, is part of the repository and needs no download.
"""

import argparse
from pathlib import Path

from common import ROOT, cli, data, downloads


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", nargs="+", default=[], choices=list(downloads.SOURCES), help="datasets to fetch")
    parser.add_argument("--data-dir", type=Path, help="where datasets go (default: data/)")
    parser.add_argument("--output", type=Path, default=ROOT, help="where the folders go (default: the repository)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_args()
    for folder in ("data", "figures", "results"):
        (options.output / folder).mkdir(parents=True, exist_ok=True)
    root = options.data_dir or options.output / "data"
    for name in options.download:
        dataset = downloads.download(name, root, options.quiet)
        if not options.quiet:
            counts = f"{len(dataset.x)} training and {len(dataset.x_test)} test images"
            print(f"{dataset.label}: {counts} in {data.locate(name, root)[0]}")


if __name__ == "__main__":
    cli.guard(main)
