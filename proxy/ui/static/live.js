// Shows the transfers as they change.  Without it, the page shows them as they were when it was loaded.
"use strict";
(() => {
  const live = document.getElementById("live");
  const state = document.getElementById("live-state");
  let source = null;

  function show(html) {
    const link = live.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    live.innerHTML = html; // made by the server, which escapes all values
    if (link !== null) {
      for (const each of live.querySelectorAll("[aria-label]")) {
        if (each.getAttribute("aria-label") === link) each.focus({ preventScroll: true });
      }
    }
  }

  function open() {
    source = new EventSource(live.dataset.events);
    source.onopen = () => { state.textContent = "Live"; };
    source.onmessage = (event) => show(JSON.parse(event.data));
    source.onerror = () => {
      const ended = source.readyState === EventSource.CLOSED;
      state.textContent = ended ? "Not live: load the page again" : "Connecting again";
    };
  }

  // A browser has few connections to a server: a page that nobody sees gives its one back.
  document.addEventListener("visibilitychange", () => {
    source.close();
    if (!document.hidden) open();
  });
  open();
})();
