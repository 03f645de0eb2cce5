// Follows a run: asks for its state each second, and for its figures when they have changed.
(function () {
  "use strict";
  var EVERY = 1000, version = -1, ended = false;
  function id(name) { return document.getElementById(name); }
  function put(name, text) { id(name).textContent = text; }
  function show(name, shown) { id(name).hidden = !shown; }
  function known(number) { return typeof number === "number" && isFinite(number); }

  function duration(seconds) {
    if (seconds < 100) { return seconds.toFixed(0) + " s"; }
    return seconds < 6000 ? (seconds / 60).toFixed(0) + " min" : (seconds / 3600).toFixed(1) + " h";
  }

  function cell(kind, text) {
    var made = document.createElement(kind);
    made.textContent = text;
    return made;
  }

  function fill(table, rows) {
    var keys = [];
    rows.forEach(function (row) {
      Object.keys(row).forEach(function (key) { if (keys.indexOf(key) < 0) { keys.push(key); } });
    });
    var lines = [keys.map(function (key) { return cell("th", key); })];
    rows.forEach(function (row) {
      lines.push(keys.map(function (key) { return cell("td", key in row ? row[key] : ""); }));
    });
    id(table).replaceChildren.apply(id(table), lines.map(function (cells) {
      var line = document.createElement("tr");
      line.replaceChildren.apply(line, cells);
      return line;
    }));
  }

  function tell(status) {
    var said = [status.text || ""];
    if (known(status.left)) { said.push("about " + duration(status.left) + " left"); }
    if (known(status.since)) {
      said.push((status.slow ? "slow: " : "") + "last news " + duration(status.since) + " ago" +
        (status.slow && known(status.seconds) ? ", where it takes " + duration(status.seconds) : ""));
    }
    put("title", status.title);
    document.title = (status.text ? status.text + " · " : "") + status.title;
    put("folder", status.folder);
    put("state", status.state);
    id("state").className = "state " + status.state;
    put("text", said.filter(Boolean).join(", "));
    show("bar", known(status.of) && status.of > 0);
    id("bar").value = status.of ? Math.min(1, status.done / status.of) : 0;
    put("why", status.why || "");
    show("why", Boolean(status.why));
    var head = status.headline;
    show("headline", Boolean(head && head.name && head.value));
    if (head) {
      put("metric", head.name);
      put("value", head.value);
      put("before", head.before ? head.before + " before round 1" : "");
    }
    var cards = status.cards || {};
    id("cards").replaceChildren.apply(id("cards"), Object.keys(cards).map(function (key) {
      var card = document.createElement("div"), name = cell("span", key);
      name.className = "soft";
      card.replaceChildren(name, cell("b", cards[key]));
      return card;
    }));
    var rows = status.table || [], missed = status.clients || [];
    show("several", rows.length > 0);
    fill("table", rows);
    show("missed", missed.length > 0);
    fill("clients", missed.map(function (each) {
      return { client: each.client, rounds: each.times, last: each.last, why: each.why };
    }));
    var events = (status.events || []).slice().reverse();
    show("happened", events.length > 0);
    fill("events", events.map(function (each) { return { round: each[0], what: each[1] }; }));
  }

  function paint() {
    var style = getComputedStyle(document.documentElement);
    var ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
    document.querySelectorAll(".plot").forEach(function (element) {
      Plotly.relayout(element, {
        "font.color": ink, "xaxis.gridcolor": line, "yaxis.gridcolor": line,
        "xaxis.linecolor": line, "yaxis.linecolor": line, "hoverlabel.font.color": ink,
        "hoverlabel.bgcolor": style.getPropertyValue("--card").trim()
      });
    });
  }

  function draw(figures) {
    var grid = id("curves"), titles = Object.keys(figures);
    show("drawn", titles.length > 0);
    Array.from(grid.children).forEach(function (card) {
      if (titles.indexOf(card.dataset.title) < 0) { card.remove(); }
    });
    titles.forEach(function (title) {
      var card = Array.from(grid.children).find(function (each) { return each.dataset.title === title; });
      if (!card) {
        card = document.createElement("section");
        card.className = "card";
        card.dataset.title = title;
        var plot = document.createElement("div");
        plot.className = "plot";
        card.replaceChildren(cell("h3", title), plot);
      }
      grid.appendChild(card);  // in the order of the titles
      var figure = figures[title], place = card.querySelector(".plot");
      figure.layout.uirevision = title;  // who looks closer goes on looking there
      figure.layout.autosize = true;
      place.style.height = figure.layout.height + "px";
      Plotly.react(place, figure.data, figure.layout, { responsive: true, displaylogo: false, displayModeBar: false });
    });
    paint();
  }

  function ask(name) {
    return fetch(name, { cache: "no-store" }).then(function (answer) {
      if (!answer.ok) { throw new Error(answer.status); }
      return answer.json();
    });
  }

  function look() {
    ask("status.json").then(function (status) {
      tell(status);
      show("gone", false);
      ended = ["running", "starting", "closing"].indexOf(status.state) < 0;
      if (status.version === version) { return null; }
      return ask("figures.json").then(function (figures) {
        version = status.version;
        draw(figures);
      });
    }).catch(function () {
      put("gone", ended
        ? "This page is not served any more. What is shown is the end: fedraclora report keeps it."
        : "This page is not served any more: fedraclora watch shows the run again.");
      show("gone", true);
    }).then(function () { setTimeout(look, EVERY); });
  }

  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  look();
})();
