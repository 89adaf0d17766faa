"""Test-only node pack: looks into the server's models. Shares no code with the extension."""

from .dual_monitor import ProbeDualMonitor
from .handlers import add_clock
from .models import ProbeModel, add_route

add_route()
add_clock()

NODE_CLASS_MAPPINGS = {"ProbeDualMonitor": ProbeDualMonitor, "ProbeModel": ProbeModel}
