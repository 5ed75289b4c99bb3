// A document that stays open at the service. This page's address leads back to it.
import * as api from "./api.js";
import { Evidence } from "./evidence.js";
import { Text } from "./text.js";

const PIECES = 32; // of what is appended: there is an answer after each
const LEAST_BYTES = 4096; // of a piece

// The id in the page's address, if there is one.
export const named = () => new URLSearchParams(location.hash.slice(1)).get("session");

export class Session {
  constructor(answer) {
    this.take(answer);
    this.forget();
  }

  static async begin(model) {
    return new Session(await api.begin(model));
  }

  static async open(id) {
    return new Session(await api.session(id));
  }

  // The service keeps no text: this page has what it has sent itself.
  forget() {
    this.from = this.offset;
    this.parts = [];
    this.evidence = null;
    this.points = [];
  }

  take(answer) {
    this.answer = answer;
    this.id = answer.id;
    this.offset = answer.offset;
    this.expires = new Date(answer.expires_at);
  }

  // Look again, for an append that failed may have left some of it, and others may append too.
  async refresh() {
    const before = this.offset;
    this.take(await api.session(this.id));
    if (this.offset !== before) this.forget();
  }

  async append(blob, { info, onSent, onProgress, signal }) {
    const piece = Math.min(info.limits.max_document_bytes, Math.max(LEAST_BYTES, Math.ceil(blob.size / PIECES)));
    for (let at = 0; at < blob.size; at += piece) {
      const part = await blob.slice(at, at + piece).arrayBuffer();
      const sent = { onSent: (bytes) => onSent(at + bytes), signal };
      const answer = await api.append(this.id, this.offset, new Blob([part]), sent);
      this.parts.push(part);
      this.take(answer);
      if (!answer.evidence) continue; // there is no whole character yet
      this.evidence = new Evidence(answer, info).after(this.evidence);
      onProgress(answer);
    }
  }

  async text() {
    return new Text(new Uint8Array(await new Blob(this.parts).arrayBuffer()), this.from);
  }
}
