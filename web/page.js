/* What of the page runs in the browser: the conversation, of which the server keeps nothing, and those before it.

   `page` is what Gradio's events call. A turn: `ask` hands the server the conversation, with a number that comes back
   with the reply; `settle` takes the reply, or what went wrong; what belongs to another number is out of date.
   Every text is put into the page as text, never as markup.
*/
const page = (() => {
  const KEPT = "transfertransfo:", MOST_SHARED = 256 * 1024, CARDS = 5, CHECK = 2000, SLOW_CHECK = 30000;
  let now = null;          // the conversation: id, persona, own, said (yours first), thumbs, title, at
  let turn = 0;            // the number of what was asked last
  let asking = null;       // what is under way: said, and the text that is given back when it fails
  let choosing = false;    // two replies wait for a choice
  let waiting = false;     // Enter was pressed while a reply was coming
  let following = false;   // the address follows the conversation
  let recalled = null;     // how many messages back the box shows
  let lost = null;         // the timer that looks for a lost server
  let started = false;

  // ------------------------------------------------------------------------------------------------ small helpers

  const find = selector => document.querySelector(selector);
  const box = () => find("#message textarea");
  const button = id => find(`button#${id}, #${id} button`);
  const cards = () => [...document.querySelectorAll("#cards textarea")];
  const lines = text => text.split("\n").map(line => line.trim()).filter(Boolean);
  const persona = () => cards().flatMap(card => lines(card.value));
  const own = () => lines(find("#own textarea")?.value ?? now.own.join("\n"));
  const busy = () => asking !== null || choosing;
  const send_what_waits = () => { if (waiting) setTimeout(send); waiting = false; };
  // Gradio's chat takes texts for markup: a mark that nobody sees, behind these two letters, keeps them letters.
  const hide = text => text.replace(/[<&]/g, "$&\u2060"), plain = text => text.replace(/([<&])\u2060/g, "$1");
  const update = changes => ({__type__: "update", ...changes});

  function write(element, text) {
    if (!element || element.value === text) return;
    element.value = text;
    element.dispatchEvent(new Event("input", {bubbles: true}));
  }

  function make(tag, text, attributes = {}, act = null) {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (act) element.addEventListener("click", act);
    return element;
  }

  function notice(text, act = null, label = "") {
    const place = find("#notice [role]");
    place.replaceChildren();
    if (!text) return;
    place.append(make("span", text));
    if (act) place.append(make("button", label, {class: "small"}, () => { notice(""); act(); }));
    place.append(make("button", "✕", {class: "small", "aria-label": "Close this message"}, () => notice("")));
  }

  const messages = said => said.map((text, place) => (
    {role: place % 2 ? "assistant" : "user", content: [{type: "text", text: hide(text)}], metadata: null, options: null}));
  const thumbs = () => now.said.flatMap((_, place) => place % 2 ? [now.thumbs[place] ?? null] : []);
  const shown = said => update({value: messages(said), feedback_value: thumbs()});
  const show = () => button("show").click();

  // ---------------------------------------------------------------------------------- conversations, kept in the browser

  function kept() {
    const all = [];
    try {
      for (const key of Object.keys(localStorage)) {
        if (!key.startsWith(KEPT)) continue;
        try {
          const one = JSON.parse(localStorage[key]);
          if (whole(one)) all.push(one);
        } catch { /* somebody else's */ }
      }
    } catch { /* the browser keeps nothing */ }
    return all.sort((one, other) => other.at - one.at);
  }

  function whole(one) {
    const texts = list => Array.isArray(list) && list.every(text => typeof text === "string");
    return one && typeof one.id === "string" && texts(one.persona) && texts(one.own) && texts(one.said)
      && typeof one.thumbs === "object" && one.thumbs !== null;
  }

  function save() {
    now.persona = persona();
    now.own = own();
    now.at = Date.now();
    try {
      if (now.said.length) localStorage[KEPT + now.id] = JSON.stringify(now);
      else localStorage.removeItem(KEPT + now.id);
      const draft = [asking?.text, box()?.value].filter(Boolean).join("\n");  // also what is not answered yet
      sessionStorage[KEPT] = JSON.stringify({...now, draft, lost: lost !== null});
    } catch {
      notice("This browser has no room for the conversation; it is lost when the page is closed. Export keeps it.");
    }
    list();
    if (following) address().then(where => history.replaceState(null, "", where));
  }

  function begin(sentences, said = [], mine = []) {
    stop();
    now = {id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8), persona: sentences, own: mine, said,
           thumbs: {}, title: "", at: Date.now()};
    enter();
  }

  /** Show the conversation that is now current. */
  function enter() {
    turn++;
    [asking, choosing, recalled] = [null, false, null];
    const rest = now.persona.slice(CARDS - 1).join("\n");
    cards().forEach((card, place) => write(card, place < CARDS - 1 ? now.persona[place] ?? "" : rest));
    write(find("#own textarea"), now.own.join("\n"));
    notice("");
    document.body.classList.remove("busy");
    show();
    save();
    hint();
    send_what_waits();
  }

  function open(one) {
    if (asking) stop();
    if (one.id !== now.id) { following = false; history.replaceState(null, "", location.pathname + location.search); }
    now = {title: "", ...one};
    if (now.said.length % 2) write(box(), now.said.pop());  // a message whose reply never came
    enter();
    drawer("");
  }

  function remove(one) {
    try { localStorage.removeItem(KEPT + one.id); } catch { /* nothing is kept */ }
    const back = () => {
      try { localStorage[KEPT + one.id] = JSON.stringify(one); } catch { /* nothing is kept */ }
      open(one);
    };
    if (one.id === now.id) begin(persona(), [], own());
    else list();
    notice("The conversation is deleted.", back, "Put it back");
  }

  function list() {
    const place = find("#conversations");
    if (!place || place.querySelector("input")) return;
    place.replaceChildren(...kept().map(one => {
      const title = one.title || one.said[0] || "Nothing said yet", item = make("li", "");
      item.append(make("button", title, {class: "small open", ...(one.id === now.id ? {"aria-current": "true"} : {})},
                       () => open(one)),
                  make("button", "✎", {class: "small", "aria-label": `Rename: ${title}`}, () => rename(one, item, title)),
                  make("button", "✕", {class: "small", "aria-label": `Delete: ${title}`}, () => remove(one)));
      return item;
    }));
    if (!place.children.length) place.append(make("li", "Kept in this browser, once something is said.", {class: "faint"}));
  }

  function rename(one, item, title) {
    const field = make("input", "", {"aria-label": "Name of the conversation", maxlength: "80"});
    let over = false;  // to take the field away takes its focus, too
    const done = keep => {
      if (over) return;
      over = true;
      const name = field.value.trim();
      field.remove();
      if (keep && name) {
        if (one.id === now.id) now.title = name;
        try { localStorage[KEPT + one.id] = JSON.stringify({...one, title: name}); } catch { /* nothing is kept */ }
      }
      list();
    };
    field.value = title;
    field.addEventListener("keydown", event => {
      if (event.key === "Enter") done(true);
      if (event.key === "Escape") { event.stopPropagation(); done(false); }
    });
    field.addEventListener("blur", () => done(true));
    item.firstChild.replaceWith(field);
    field.select();
  }

  // -------------------------------------------------------------------------------------------------------- a turn

  /** Have the last of `said` answered. `text`: what goes back into the box when that fails. */
  function request(said, text) {
    if (busy()) return;
    turn++;
    asking = {said, text, failed: 0};
    recalled = null;
    document.body.classList.add("busy");
    notice("");
    chips([]);
    button("ask").click();
    watch();
  }

  function send() {
    const text = box().value.trim();
    if (!text) return;
    if (!now) { waiting = true; return; }  // the page is not ready yet
    if (choosing) return notice("Choose one of the two replies first; your message stays in the box.");
    if (asking) { waiting = true; return; }
    write(box(), "");
    request([...now.said, text], text);
  }

  /** For the event: what the server gets, the chat with the new message, and the box with Stop in the place of Send. */
  function ask() {
    return [JSON.stringify({turn, conversation: now.id, persona: persona(), said: asking.said}),
            update({value: messages(asking.said)}), update({submit_btn: false, stop_btn: "Stop"})];
  }

  function settle(told) {
    const answer = told ? JSON.parse(told) : {turn};
    if (answer.turn !== turn || !(asking || choosing)) return [update({}), update({})];
    const {text} = asking ?? {text: ""};
    if (answer.choosing) {
      [asking, choosing] = [null, true];
      return [update({}), update({submit_btn: "Send", stop_btn: false})];
    }
    [asking, choosing] = [null, false];
    document.body.classList.remove("busy");
    if (answer.said) {
      now.said = answer.said;
      for (const place of Object.keys(now.thumbs)) if (place >= now.said.length - 1) delete now.thumbs[place];
      notice(answer.note ?? "");
      send_what_waits();
    } else {
      give_back(text);
      notice(answer.error ?? "");
      waiting = false;
    }
    save();
    setTimeout(() => { look(); hint(); });
    return [shown(now.said), update({submit_btn: "Send", stop_btn: false})];
  }

  function give_back(text) {
    const written = box().value;
    if (text && written.trim() !== text) write(box(), written.trim() ? `${text}\n${written}` : text);
  }

  /** For the event, when the server has not answered at all. */
  function failed() {
    if (asking || choosing) {
      give_back(asking?.text ?? "");
      [asking, choosing, waiting] = [null, false, false];
      turn++;
      document.body.classList.remove("busy");
      missing();
    }
    return [shown(now.said), update({submit_btn: "Send", stop_btn: false})];
  }

  function stop() {
    if (busy()) button("halt").click();
  }

  function retry() {
    if (now.said.length > 1) request(now.said.slice(0, -1), "");
  }

  function undo() {
    if (busy() || now.said.length < 2) return;
    give_back(now.said.at(-2));
    now.said = now.said.slice(0, -2);
    delete now.thumbs[now.said.length + 1];
    save();
    show();
    hint();
    box().focus();
  }

  /** A message of yours was changed in the chat: what follows it is forgotten, and it is answered anew. */
  function edit(chat) {
    const texts = chat.map(message => plain(message.content.map(part => part.text ?? "").join("")).trim());
    const place = texts.findIndex((text, place) => text !== now.said[place]?.trim());
    if (place < 0 || place % 2 || !texts[place]) return show();
    request(texts.slice(0, place + 1), texts[place]);
  }

  function clear() {
    remove({...now, said: [...now.said]});
  }

  function mark(told) {
    if (told) {
      const {place, liked, note} = JSON.parse(told);
      now.thumbs[place] = liked === null ? null : liked ? "Like" : "Dislike";
      if (note) notice(note);
      save();
    }
    return update({feedback_value: thumbs()});
  }

  /** Somebody was drawn, for a conversation that has not begun or instead of one that has. */
  function drawn(told) {
    const sentences = JSON.parse(told);
    if (!started) return start(sentences);
    const over = now.said.length > 0;
    begin(sentences, [], own());
    if (over) notice("This is a new conversation; the one before is in the list of conversations.");
  }

  // ------------------------------------------------------------------------------------------ suggestions, what it sees

  function hint() {
    chips([], now.said.length ? "Suggestions are on their way …" : "");
    if (find("#suggests input")?.checked === false) return chips([], "");
    button("hint").click();
  }

  const hinted = () => JSON.stringify({turn, conversation: now.id, persona: persona(), own: own(), said: now.said});

  function suggested(told) {
    if (!told) return;
    const {turn: of, texts} = JSON.parse(told);
    if (of === turn && !busy()) chips(texts);
  }

  function chips(texts, otherwise = "") {
    find("#chips")?.replaceChildren(...texts.map(text => make("button", text, {class: "small", title: text}, () => {
      write(box(), text);
      box().focus();
    })), ...(texts.length || !otherwise ? [] : [make("p", otherwise)]));
  }

  const visible = element => element && getComputedStyle(element).visibility === "visible";
  const look = () => { if (visible(find("#right"))) button("look").click(); };

  /** Begin with the reply's first token. */
  function looked() {
    const first = find("#seen button.token");
    if (first && !find("#seen button.token[aria-pressed=true]")) token(first);
  }

  /** Show the alternatives of a token of the reply, and on which sentences of the personality it draws. */
  function token(chosen) {
    const seen = chosen.closest(".seen"), step = JSON.parse(chosen.dataset.step);
    for (const one of seen.querySelectorAll("button.token")) one.setAttribute("aria-pressed", one === chosen);
    seen.querySelectorAll(".sentence").forEach((one, place) => one.style.setProperty("--share", step.draws[place] ?? 0));
    seen.querySelector(".draws").textContent = step.told;
    seen.querySelector("caption").textContent = `In the place of “${step.token}”: as the model gave it, and after temperature and filter`;
    seen.querySelector("tbody").replaceChildren(...step.words.map(([word, before, after]) => {
      const row = make("tr", "", word === step.token ? {"aria-current": "true"} : {}), bars = make("td", "");
      row.append(make("th", word, {scope: "row"}));
      for (const share of [before, after]) {
        row.append(make("td", `${(100 * share).toFixed(1)}%`));
        const bar = make("div", "", {class: "bar"});
        bar.style.width = `${100 * share}%`;
        bars.append(bar);
      }
      row.append(bars);
      return row;
    }));
  }

  // ----------------------------------------------------------------------------------------------- sharing, exporting

  async function through(bytes, stream) {
    const reader = new Blob([bytes]).stream().pipeThrough(stream).getReader(), parts = [];
    for (let size = 0; ;) {
      const {done, value} = await reader.read();
      if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
      if ((size += value.length) > MOST_SHARED) throw new Error("too long");
      parts.push(value);
    }
  }

  async function address() {
    const text = JSON.stringify({personality: persona(), own: own(), said: now.said});
    const packed = await through(new TextEncoder().encode(text), new CompressionStream("deflate"));
    const letters = btoa(Array.from(packed, byte => String.fromCharCode(byte)).join(""));
    return `${location.origin}${location.pathname}#${letters.replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "")}`;
  }

  async function shared(fragment) {
    const letters = atob(fragment.replace(/-/g, "+").replace(/_/g, "/"));
    const text = new TextDecoder().decode(await through(Uint8Array.from(letters, letter => letter.charCodeAt(0)),
                                                        new DecompressionStream("deflate")));
    const {personality, own: mine, said} = JSON.parse(text);
    if (!whole({id: "", persona: personality, own: mine, said, thumbs: {}})) throw new Error("not a conversation");
    return [personality, said, mine];
  }

  async function share() {
    const where = await address();
    following = true;
    history.replaceState(null, "", where);
    let copied = true;
    try {
      await navigator.clipboard.writeText(where);
    } catch {  // pages that came without encryption from another machine have no clipboard
      const field = make("textarea", where);
      document.body.append(field);
      field.select();
      copied = document.execCommand("copy");
      field.remove();
    }
    notice(copied ? "The address is copied. It holds the whole conversation and follows it; nothing of it is kept on the server."
                  : "Copy the address from the browser's address bar: it holds the whole conversation and follows it.");
  }

  function download() {
    const turns = now.said.flatMap((text, place) => place % 2 ? [{history: now.said.slice(0, place), candidates: [text]}] : []);
    if (!turns.length) return notice("There is nothing to export yet; say something first.");
    const entry = {personality: persona(), utterances: turns};
    const text = JSON.stringify({train: [entry], valid: [entry]}, null, 1) + "\n";
    const link = make("a", "", {download: "conversation.json"});
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.click();
  }

  // --------------------------------------------------------------------------------------------------- a lost server

  async function alive() {
    try {
      const state = await fetch("healthz", {signal: AbortSignal.timeout(5000)});
      return state.status < 500 || (await state.json()).status !== "stopping";
    } catch {
      return false;
    }
  }

  function missing() {
    notice("The server cannot be reached. Your text and the conversation are kept; this page looks for it every two seconds.");
    if (lost) return;
    document.body.classList.add("lost");
    lost = setInterval(async () => {
      if (!await alive()) return;
      save();
      location.reload();  // Gradio takes no events any more; what is written comes back with the conversation
    }, CHECK);
  }

  /** Gradio passes nothing on once its connection is lost, and does not say so. */
  const see_whether_it_went = () => setTimeout(async () => {
    if (started && !busy() && box().value.trim() && !await alive()) missing();
  }, 300);

  /** While a reply is awaited, see whether there is still somebody who may give it. */
  async function watch() {
    const mine = turn;
    while (asking && turn === mine) {
      await new Promise(done => setTimeout(done, CHECK));
      if (!asking || turn !== mine) return;
      asking.failed = await alive() ? 0 : asking.failed + 1;
      if (asking?.failed > 1) {
        failed();
        return button("fail").click();  // for the chat and the buttons, if Gradio still takes it
      }
    }
  }

  setInterval(async () => { if (started && !lost && !asking && !document.hidden && !await alive()) missing(); }, SLOW_CHECK);

  // ---------------------------------------------------------------------------------------------- the page as a whole

  function drawer(name) {
    for (const one of ["rest", "right"]) {
      document.body.classList.toggle(`show-${one}`, one === name);
      find(`[data-drawer=${one}]`)?.setAttribute("aria-expanded", one === name);
    }
    if (name) find(`#${name} .drawer-close`)?.focus();
    if (name === "right") setTimeout(look);
  }

  function shade(dark) {
    document.body.classList.toggle("dark", dark);
    find("#theme")?.setAttribute("aria-label", dark ? "Light colours" : "Dark colours");
  }

  async function start(sentences) {
    started = true;
    shade_as_chosen();
    const before = await before_reload(), fragment = location.hash.slice(1);
    setTimeout(() => {
      document.body.classList.add("ready");
      if (before?.lost) box().focus();
    }, 100);
    if (fragment) {
      try {
        begin(...await shared(fragment));
        following = true;
        return;
      } catch {
        history.replaceState(null, "", location.pathname + location.search);
        begin(sentences);
        return notice("This address holds no conversation, or not all of it; copy it again, whole.");
      }
    }
    if (!before) return begin(sentences);
    now = before;
    if (!box().value) write(box(), before.draft ?? "");
    enter();
    if (before.lost) notice("The server is back.");
  }

  async function before_reload() {
    try {
      const one = JSON.parse(sessionStorage[KEPT] ?? "null");
      return whole(one) ? {title: "", ...one} : null;
    } catch {
      return null;
    }
  }

  const dark = () => document.body.classList.contains("dark");
  function shade_as_chosen() {
    let chosen = null;
    try { chosen = localStorage["transfertransfo-theme"]; } catch { /* nothing is kept */ }
    shade(chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  }
  addEventListener("hashchange", () => location.reload());
  addEventListener("storage", () => started && list());
  addEventListener("pagehide", () => { if (started) save(); });
  addEventListener("offline", () => started && missing());

  document.addEventListener("click", event => {
    if (event.target.closest?.("#message .submit-button")) see_whether_it_went();
    const clicked = event.target.closest?.("[data-act], [data-drawer], button.token");
    if (!clicked) return;
    if (clicked.matches(".token")) token(clicked);
    else if (clicked.dataset.drawer !== undefined) drawer(document.body.classList.contains(`show-${clicked.dataset.drawer}`)
                                                          ? "" : clicked.dataset.drawer);
    else { acts[clicked.dataset.act](); drawer(""); }
  });
  for (const kind of ["mouseover", "focusin"])
    document.addEventListener(kind, event => {
      const over = event.target.closest?.("button.token");  // the number in it, too
      if (over) token(over);
    });

  const acts = {
    share, download,
    renew: () => { begin(persona(), [], own()); box().focus(); },
    theme: () => {
      shade(!dark());
      try { localStorage["transfertransfo-theme"] = dark() ? "dark" : "light"; } catch { /* nothing is kept */ }
    },
  };

  document.addEventListener("keydown", event => {
    if (event.key === "Escape") drawer("");
    if (event.key === "Enter" && event.target === box()) see_whether_it_went();
    if (event.target !== box() || event.isComposing || !["ArrowUp", "ArrowDown"].includes(event.key)) return;
    const mine = now.said.filter((_, place) => place % 2 === 0), field = box();
    const back = (recalled ?? 0) + (event.key === "ArrowUp" ? 1 : -1);
    if (recalled === null ? field.value || event.key === "ArrowDown" : field.value !== (mine.at(-recalled) ?? "")) return;
    if (back > mine.length) return event.preventDefault();
    recalled = back > 0 ? back : null;
    write(field, recalled ? mine.at(-recalled) : "");
    event.preventDefault();
  });
  document.addEventListener("input", event => {
    if (event.target === box()) waiting = false;
  });
  document.addEventListener("change", event => {  // the cards and your own personality belong to the conversation
    if (started && event.target.closest("#cards, #own")) save();
  });
  document.addEventListener("paste", event => {  // a personality of several lines fills the cards from here on
    const place = cards().indexOf(event.target), text = event.clipboardData?.getData("text") ?? "";
    if (place < 0 || event.target.value || lines(text).length < 2) return;
    event.preventDefault();
    const rest = lines(text);
    cards().slice(place).forEach((card, number, all) => {
      if (rest.length && (!number || !card.value || number === all.length - 1))
        write(card, number === all.length - 1 ? [...lines(card.value), ...rest.splice(0)].join("\n") : rest.shift());
    });
    save();
  });

  const copy = navigator.clipboard?.writeText.bind(navigator.clipboard);
  if (copy) navigator.clipboard.writeText = text => copy(plain(text));

  return {ask, settle, failed, send, stop, retry, undo, edit, clear, mark, drawn, hinted, suggested, looked,
          show: () => shown(now.said)};
})();
