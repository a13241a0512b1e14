// Find what ?q= says in search/search_index.json, with no request to another server.
"use strict";

const MOST = 40; // results that are shown
const AROUND = 120; // characters of the text around what was found

const input = document.getElementById("query");
const found = document.getElementById("found");
const results = document.getElementById("results");

function indexOf(documents) {
  return lunr(function () {
    this.ref("location");
    this.field("title", { boost: 10 });
    this.field("text");
    this.metadataWhitelist = ["position"];
    documents.forEach((each) => this.add(each));
  });
}

function search(index, text) {
  const terms = lunr.tokenizer(text).map(String);
  return index.query((query) => {
    terms.forEach((term) => {
      query.term(term, { boost: 10 });
      query.term(term, { wildcard: lunr.Query.wildcard.TRAILING, usePipeline: false });
    });
  });
}

function excerpt(text, matches) {
  const places = Object.values(matches).flatMap((each) => (each.text ? each.text.position.map(([at]) => at) : []));
  const start = places.length ? Math.max(0, Math.min(...places) - AROUND / 2) : 0;
  const begin = start ? text.indexOf(" ", start) + 1 : 0;
  return (begin ? "… " : "") + text.slice(begin, begin + 2 * AROUND).trim() + (begin + 2 * AROUND < text.length ? " …" : "");
}

function item(each, document_) {
  const link = Object.assign(document.createElement("a"), { href: each.ref, textContent: document_.title });
  const text = Object.assign(document.createElement("p"), { textContent: excerpt(document_.text, each.matchData.metadata) });
  const made = document.createElement("li");
  made.append(link, text);
  return made;
}

async function show(text) {
  const answer = await fetch("search/search_index.json");
  const documents = (await answer.json()).docs.map(({ location, title, text: html }) => ({
    location,
    title: plain(title),
    text: plain(html),
  }));
  const byLocation = new Map(documents.map((each) => [each.location, each]));
  const hits = search(indexOf(documents), text);
  results.replaceChildren(...hits.slice(0, MOST).map((each) => item(each, byLocation.get(each.ref))));
  found.textContent = hits.length === 1 ? "1 section" : `${hits.length} sections${hits.length > MOST ? `, the best ${MOST} of them` : ""}`;
}

// The index has the text of pages as HTML: without elements, but with entities.
function plain(html) {
  return new DOMParser().parseFromString(html, "text/html").body.textContent;
}

const asked = new URLSearchParams(location.search).get("q") || "";
input.value = asked;
found.textContent = asked ? "Searching…" : "Type what you look for.";
if (asked) show(asked).catch((error) => (found.textContent = `The search failed: ${error.message}`));
else input.focus();
