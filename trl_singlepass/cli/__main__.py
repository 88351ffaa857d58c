"""`python -m trl_singlepass.cli`."""

from .main import main


raise SystemExit(main())
