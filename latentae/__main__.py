import sys

from latentae.cli.main import main

sys.exit(main())
