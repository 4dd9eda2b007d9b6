import sys

from gpt4lib.cli import main

sys.exit(main())
