"""x"""

import multiprocessing, multiprocessing.forkserver, os, sys
from pathlib import Path
import pytest
from tests.elastic.process_histories import *
