"use strict";
(() => {
  const KEPT = "lorafit-serve";
  const SIDES = ["left", "right"];
  const at = (id) => document.getElementById(id);
  const fields = ["temperature", "length", "system", "key"];
  const running = new Map();
  let base = "";
  let state = restored();

  function restored() {
    const fresh = { turns: [], left: "", right: null, settings: {} };
    try {
      const kept = JSON.parse(sessionStorage.getItem(KEPT));
      return kept && Array.isArray(kept.turns) && kept.settings ? { ...fresh, ...kept } : fresh;
    } catch {
      return fresh;
    }
  }

  function keep() {
    for (const name of fields) state.settings[name] = at(name).value;
    for (const side of SIDES) if (at(side).options.length) state[side] = at(side).value;
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(state));
    } catch {
      // Full, or switched off: the conversation then lasts as long as the page.
    }
  }

  // Text of a model or a user goes into text nodes and nowhere else.
  function made(tag, kind = "", text = "") {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text) element.append(document.createTextNode(text));
    return element;
  }

  function trouble(text) {
    at("trouble").textContent = text;
    at("trouble").hidden = !text;
  }

  // Models

  async function request(path, body, signal) {
    const headers = { accept: "application/json" };
    const key = at("key").value.trim();
    if (key) headers.authorization = `Bearer ${key}`;
    const options = { headers, signal, cache: "no-store", credentials: "omit" };
    if (body) {
      headers["content-type"] = "application/json";
      Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    }
    const response = await fetch(path, options);
    if (response.ok) return response;
    let told = {};
    try {
      told = (await response.json()).error || {};
    } catch {
      // Not from this server: something stands between.
    }
    if (response.status === 401) askForKey();
    throw Object.assign(new Error(told.message || `the server answered ${response.status}`), { code: told.code });
  }

  function askForKey() {
    at("keys").hidden = false;
    at("key").focus();
  }

  async function models() {
    try {
      const response = await request("/v1/models");
      const cards = (await response.json()).data;
      offer(cards);
      trouble("");
    } catch (error) {
      trouble(`The models cannot be listed: ${error.message}`);
    }
  }

  function offer(cards) {
    base = (cards.find((card) => card.parent === null) || cards[0]).id;
    const names = cards.map((card) => card.id);
    const adapters = names.filter((name) => name !== base);
    const wanted = { left: state.left, right: state.right === null ? adapters[0] || "" : state.right };
    for (const side of SIDES) {
      const options = names.map((name) => new Option(name === base ? `${name} (base)` : name, name));
      if (side === "right") options.push(new Option("nobody", ""));
      at(side).replaceChildren(...options);
      const fallback = side === "left" ? base : adapters[0] || "";
      at(side).value = names.includes(wanted[side]) || wanted[side] === "" && side === "right" ? wanted[side] : fallback;
    }
    const count = adapters.length;
    at("served").textContent = count ? `${count} adapter${count === 1 ? "" : "s"} on one base` : "no adapters";
    keep();
  }

  // Drawing

  function draw() {
    at("log").replaceChildren();
    for (const turn of state.turns) {
      const outputs = drawTurn(turn);
      for (const side of SIDES) if (turn.answers[side]) drawAnswer(outputs, turn.answers[side]);
    }
    at("empty").hidden = state.turns.length > 0;
  }

  function drawTurn(turn) {
    const card = made("article", "sample");
    const prompt = made("div", "prompt");
    prompt.append(made("h3", "", "You"), made("div", "text", turn.question));
    const outputs = made("div", "outputs");
    card.append(prompt, outputs);
    at("log").append(card);
    at("empty").hidden = true;
    return outputs;
  }

  function drawAnswer(outputs, answer) {
    const output = made("div", `output ${answer.model === base || answer.base ? "before" : "after"}`);
    const heading = made("h3");
    heading.append(made("span", "", answer.model));
    const text = made("div", "text");
    const written = document.createTextNode(answer.text);
    text.append(written);
    const note = made("p", "fine", answer.note);
    output.append(heading, text, note);
    outputs.append(output);
    outputs.className = `outputs of-${outputs.childElementCount}`;
    tell(answer, output, note);
    return { output, written, note };
  }

  function tell(answer, output, note) {
    note.textContent = answer.note;
    note.hidden = !answer.note;
    note.classList.toggle("failed", Boolean(answer.failed));
    output.removeAttribute("aria-busy");
  }

  function following() {
    const page = document.documentElement;
    return page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  }

  function follow() {
    window.scrollTo(0, document.documentElement.scrollHeight);
  }

  // Asking

  function messages(side, turn, alone) {
    if (alone) return [{ role: "user", content: turn.question }];
    const system = at("system").value.trim();
    const said = system ? [{ role: "system", content: system }] : [];
    for (const earlier of state.turns) {
      const answer = earlier.answers[side];
      if (earlier === turn || !answer || answer.failed || !answer.text) continue;
      said.push({ role: "user", content: earlier.question }, { role: "assistant", content: answer.text });
    }
    return [...said, { role: "user", content: turn.question }];
  }

  async function* events(response) {
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the connection ended before the answer did");
      rest += decoder.decode(value, { stream: true });
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        if (part === "data: [DONE]") return;
        const event = JSON.parse(part.slice(6));
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  }

  async function stream(side, turn, answer, drawn, alone, signal) {
    const said = messages(side, turn, alone);
    const body = {
      model: answer.model,
      messages: said,
      temperature: number("temperature", 0),
      max_tokens: number("length", 256),
      stream: true,
      stream_options: { include_usage: true },
    };
    let response;
    try {
      response = await request("/v1/chat/completions", body, signal);
    } catch (error) {
      if (error.code !== "no_chat_template" || said.length === 1) throw error;
      return stream(side, turn, answer, drawn, true, signal);
    }
    let began = 0;
    let reason = "";
    let tokens = 0;
    for await (const event of events(response)) {
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason || reason;
      const text = choice.delta.content || "";
      if (!text) continue;
      began = began || performance.now();
      const below = following();
      answer.text += text;
      drawn.written.appendData(text);
      if (below) follow();
    }
    const seconds = (performance.now() - began) / 1000;
    const parts = [`${tokens} token${tokens === 1 ? "" : "s"}`];
    if (began && tokens > 1) parts.push(`${((tokens - 1) / seconds).toFixed(1)} a second`);
    if (reason === "length") parts.push(`cut at ${tokens}`);
    if (alone) parts.push("no chat template: the question stood alone");
    answer.note = parts.join(" · ");
  }

  function number(name, otherwise) {
    const field = at(name);
    return field.value !== "" && field.checkValidity() ? Number(field.value) : otherwise;
  }

  async function answer(side, turn, outputs) {
    const model = at(side).value;
    const given = { model, base: model === base, text: "", note: "", failed: false };
    turn.answers[side] = given;
    const drawn = drawAnswer(outputs, given);
    drawn.output.setAttribute("aria-busy", "true");
    const control = new AbortController();
    running.set(side, control);
    try {
      await stream(side, turn, given, drawn, false, control.signal);
    } catch (error) {
      given.failed = !control.signal.aborted;
      given.note = control.signal.aborted ? "stopped" : error.message;
    } finally {
      running.delete(side);
      tell(given, drawn.output, drawn.note);
    }
  }

  async function ask(text) {
    const turn = { question: text, answers: {} };
    state.turns.push(turn);
    const outputs = drawTurn(turn);
    busy(true);
    follow();
    const all = SIDES.filter((side) => at(side).value).map((side) => answer(side, turn, outputs));
    follow();
    await Promise.all(all);
    busy(false);
    if (following()) follow();
    keep();
    const failed = Object.values(turn.answers).some((one) => one.failed);
    at("status").textContent = failed ? "An answer failed." : "The answers are complete.";
  }

  function busy(yes) {
    at("send").disabled = yes;
    at("stop").hidden = !yes;
    if (yes) at("status").textContent = "Waiting for the answers.";
  }

  function stop() {
    for (const control of running.values()) control.abort();
  }

  function submit() {
    const text = at("question").value.trim();
    if (!text || running.size || !at("left").value) return;
    at("question").value = "";
    ask(text);
  }

  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  at("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  at("keys").addEventListener("submit", (event) => {
    event.preventDefault();
    keep();
    models();
  });
  at("stop").addEventListener("click", stop);
  at("reset").addEventListener("click", () => {
    stop();
    state.turns = [];
    draw();
    keep();
    at("question").focus();
  });
  for (const name of [...fields, ...SIDES]) at(name).addEventListener("change", keep);
  window.addEventListener("pagehide", keep);

  for (const name of fields) if (state.settings[name] !== undefined) at(name).value = state.settings[name];
  at("keys").hidden = !at("key").value;
  models().then(() => {
    draw();
    follow();
  });
})();
