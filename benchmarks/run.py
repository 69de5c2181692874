"""`make bench`: run every benchmark whose table stands in docs/performance.md."""

import sys

import serve_qwen3


def main() -> int:
    return serve_qwen3.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
