"""The rules of deploy/prometheus, as Prometheus itself shows them."""

from __future__ import annotations

from pathlib import Path

from tests.browser.conftest import Open
from tests.fleet import free_ports
from tests.prometheus import PrometheusServer

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml"

WITHOUT_DIRECTORY = """directory => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replace(directory, "");
}"""


async def test_an_alert_that_fires(window: Open, tmp_path: Path) -> None:
    (nowhere,) = free_ports(1)
    async with PrometheusServer(tmp_path, [f"127.0.0.1:{nowhere}"], [RULES]) as prometheus:
        assert await prometheus.wait_for("EntrepotDown") == set()
        tab = await window(prometheus.url)
        await tab.do(lambda page: page.goto(f"{prometheus.url}/classic/alerts"))
        await tab.see("EntrepotDown (1 active)")
        text = await tab.text("body")
        assert "EntrepotDown" in text and "EntrepotDegraded" in text
        await tab.do(lambda page: page.get_by_text("EntrepotDown (1 active)").click())
        await tab.see("instance=")
        # The page names the directory of the test.
        await tab.do(lambda page: page.evaluate(WITHOUT_DIRECTORY, str(tmp_path) + "/"))
        await tab.picture("alerts")
        tab.said.clear()  # the page is not ours
        tab.outside.clear()
